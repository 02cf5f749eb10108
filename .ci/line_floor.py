"""Check of the coverage of lines against a floor; the standard input is the report of `coverage json`."""

import json
import sys

#: Least percentage of lines.
FLOOR = 90.0


def main() -> int:
    """Print the coverage, and return the exit status: 1 below the floor, else 0."""
    totals = json.load(sys.stdin)["totals"]
    lines = 100 * totals["covered_lines"] / max(totals["num_statements"], 1)
    branches = 100 * totals["covered_branches"] / max(totals["num_branches"], 1)
    print(f"tests run {lines:.2f} % of the lines (at least {FLOOR:g} %) and {branches:.2f} % of the branches")
    return int(lines < FLOOR)


if __name__ == "__main__":
    sys.exit(main())
