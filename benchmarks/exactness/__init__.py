"""How far an accumulated step is from the step of the undivided batch, for every library."""
