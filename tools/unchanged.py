"""Whether the built site is that of these very sources: exits with 0 where it is, and there is nothing to build.

Compared with the note of the last build without a single warning are the contents of every file that pages or numbers
depend on, the interpreter and the version of everything installed, the scale, the data's source and the device; and
that no file of the site has been touched since. A build that is at work here is waited for.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/_ext"))

import book_finished  # noqa: E402


def main(root: Path) -> int:
    """Compare what there is with what was noted."""
    folder = root / "_build"
    with book_finished.alone(folder, print):
        try:
            noted = json.loads((folder / book_finished.NOTE).read_text())
            same = noted["sources"] == book_finished.sources(root) and noted["site"] == book_finished.site(
                folder / "html"
            )
            # Last, because it takes seconds to import what tells the settings.
            same = same and noted["settings"] == json.loads(json.dumps(book_finished.settings()))
        except (OSError, ValueError, KeyError, TypeError):
            same = False
    if same:
        print("nothing changed since the last build: _build/html/index.html is up to date (`make clean` builds anew)")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(ROOT))
