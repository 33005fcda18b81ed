"""The entry point of a worker process: ``python -m autobatch.isolation``."""

from autobatch.isolation.worker import main

if __name__ == "__main__":
    main()
