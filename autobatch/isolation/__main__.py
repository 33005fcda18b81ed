"""What ``python -m autobatch.isolation`` runs: an isolated process, for the parent to talk to."""

from autobatch.isolation.worker import main

if __name__ == "__main__":
    main()
