#!/bin/sh
# A copy of the package whose inner product is unrolled N times: lab/unroll.sh N FOLDER
cp -r src "$2" && python3 - "$1" "$2" <<'PY'
import sys
n, folder = sys.argv[1:]
path = f"{folder}/clusterfusion/cuda/ops/gemv.cuh"
text = open(path).read()
whole = "        float sum[kTogether] = {};\n#pragma unroll\n"
assert whole in text
open(path, "w").write(text.replace(whole, whole[:-1] + f" {n}\n").replace("#pragma unroll 5\n", f"#pragma unroll {n}\n"))
PY
