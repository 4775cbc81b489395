"""``python -m rtp_llm`` is ``rtp-llm``."""

import sys

from rtp_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
