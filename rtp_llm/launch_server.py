"""``python -m rtp_llm.launch_server --model-path DIR ...``: the same as ``rtp-llm serve``."""

import sys

from rtp_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
