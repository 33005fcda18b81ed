"""How predictions compare with what others measured, and how long they take."""
