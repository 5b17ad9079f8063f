"""Asks pip-audit for known vulnerabilities of the releases in lock.txt.

    python .ci/audit.py

Exit code 1: a release has a known vulnerability. Without a source of advisories nothing is
audited; that is printed as SKIPPED, by name, and the exit code is 0.
"""

import json
import pathlib
import subprocess
import sys

LOCK = pathlib.Path(__file__).with_name("lock.txt")
COMMAND = ["pip-audit", "--requirement", str(LOCK), "--require-hashes", "--disable-pip"]


def main() -> int:
    more = ["--format=json", "--progress-spinner=off"]
    audit = subprocess.run([*COMMAND, *more], capture_output=True, text=True, timeout=600)
    try:
        releases = json.loads(audit.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (audit.stderr.strip() or "no output").splitlines()[-1]
        print(f"pip-audit: SKIPPED, nothing was audited: {reason}")
        return 0
    skipped = [release["name"] for release in releases if "skip_reason" in release]
    broken = [release for release in releases if release.get("vulns")]
    audited = len(releases) - len(skipped)
    print(f"pip-audit: {audited} releases audited, {len(broken)} with known vulnerabilities")
    if skipped:
        which = ", ".join(skipped) if audited else "all of them"
        print(f"pip-audit: SKIPPED {len(skipped)}, no advisories to be had: {which}")
    for release in broken:
        for fault in release["vulns"]:
            better = ", ".join(fault["fix_versions"]) or "none yet"
            print(f"{release['name']} {release['version']}: {fault['id']}; mended in: {better}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
