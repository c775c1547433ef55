"""Train or load a network, compress it, fine-tune it and report what it cost: `python main_prune.py --config_path config.json`."""

import sys

from compress.cli import main

if __name__ == "__main__":
    sys.exit(main())
