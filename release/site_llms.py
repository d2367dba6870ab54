"""Put `llms.txt` on the documentation's site, with links to its pages. mkdocs calls `on_post_build`.

The section Optional has files that only the repository has, so it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

TEXT = Path(__file__).parent.parent / "llms.txt"


def on_post_build(config: Mapping[str, str]) -> None:
    """Write `llms.txt` next to the first page: `docs/howto/serve.md` becomes `howto/serve/`."""
    text = TEXT.read_text(encoding="utf-8").partition("\n## Optional\n")[0]
    text = re.sub(r"\]\(docs/(?:index|(\S+))\.md\)", lambda found: f"]({found[1]}/)" if found[1] else "](./)", text)
    Path(config["site_dir"], "llms.txt").write_text(text, encoding="utf-8")
