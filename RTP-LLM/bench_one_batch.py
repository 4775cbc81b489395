"""``python3 -m RTP-LLM.bench_one_batch``, from the repository's root: ``rtp_llm.bench_one_batch`` by its other name."""

import sys

from rtp_llm.bench_one_batch import main

if __name__ == "__main__":
    sys.exit(main())
