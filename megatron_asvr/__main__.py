"""``python -m megatron_asvr`` is `asvr`; under MPI: ``python -m mpi4py -m megatron_asvr``."""

import sys

from megatron_asvr.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
