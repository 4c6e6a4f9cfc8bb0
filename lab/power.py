"""Runs a command and says what power the GPU drew in its bursts: a laboratory tool.

    PYTHONPATH=src python3 lab/power.py COMMAND [ARGUMENT ...]

The command prints a line "burst BEGIN END NAME", in seconds since 1970, for every burst. Power is nvidia-smi's power.draw.instant, every 20 ms; of the
bursts of a name, the median of what was drawn after the first 0.2 s of each.
"""

from __future__ import annotations

import datetime
import statistics
import subprocess
import sys
import tempfile

QUERY = "timestamp,power.draw.instant,clocks.sm"
SETTLING_S = 0.2


def main() -> None:
    asked = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "-lms", "20"]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(asked, stdout=log) as meter:
        command = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True, check=False)
        meter.terminate()
        meter.wait()
        log.seek(0)
        lines = log.read().splitlines()
    samples = []
    for line in lines:
        try:
            at, watts, megahertz = line.split(", ")
            time = datetime.datetime.strptime(at, "%Y/%m/%d %H:%M:%S.%f").timestamp()
            samples.append((time, float(watts), float(megahertz)))
        except ValueError:
            continue  # cut off, or not known
    bursts: dict[str, list[tuple[float, float]]] = {}
    for line in command.stdout.splitlines():
        if not line.startswith("burst "):
            print(line)
            continue
        _, begin, end, name = line.split(" ", 3)
        bursts.setdefault(name, []).append((float(begin), float(end)))
    for name, spans in bursts.items():
        seen = [s for s in samples if any(begin + SETTLING_S <= s[0] <= end for begin, end in spans)]
        if not seen:
            print(f"{name}: no sample of {len(samples)} in {len(spans)} bursts")
            continue
        watts, megahertz = (statistics.median(s[i] for s in seen) for i in (1, 2))
        print(f"{name}: {watts:.0f} W (to {max(s[1] for s in seen):.0f}), {megahertz:.0f} MHz, {len(seen)} samples")
    sys.exit(command.returncode)


if __name__ == "__main__":
    main()
