"""Program that converts a checkpoint of DCP to one file with torch's own function, and prints JSON.

python -m benchmarks.checkpoint.dcp_once FOLDER FILE
"""

from __future__ import annotations

import json
import sys
import time
import warnings

from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

if __name__ == "__main__":
    start = time.perf_counter()
    with warnings.catch_warnings(action="ignore"):
        dcp_to_torch_save(sys.argv[1], sys.argv[2])
    print(json.dumps({"seconds": time.perf_counter() - start}))
