"""Put the guardian into one file that needs Python 3.10, libvirt's binding and nothing else: `python3 build.py [FILE]`."""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipapp
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "operator"
PACKAGE = "vmsnapshot_operator"
PARTS = ("__init__.py", "core/__init__.py", "core/journal.py", "guardian/*.py")
START = f"import sys\nfrom {PACKAGE}.guardian.__main__ import main\n\nsys.exit(main())\n"


def build(target: Path) -> None:
    """Write the file. Raises OSError."""
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            for path in sorted(SOURCE.glob(f"{PACKAGE}/{part}")):
                copy = Path(folder) / path.relative_to(SOURCE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        (Path(folder) / "__main__.py").write_text(START)
        zipapp.create_archive(folder, target, interpreter="/usr/bin/python3 -I")


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "vmsnapshot-guardian.pyz"))
