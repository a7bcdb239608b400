"""docs/keys.md is what docs/make_keys.py writes from the definitions of the keys."""

import runpy

from llamafactory_ddm.integration.hparams.diffusion import KEYS
from support.cli import ROOT


def test_the_page_is_up_to_date():
    script = runpy.run_path(str(ROOT / "docs" / "make_keys.py"))
    text = script["page"]()
    keys = text.partition(script["STRATEGIES"])[0]
    assert (ROOT / "docs" / "keys.md").read_text(encoding="utf-8") == text, "run python docs/make_keys.py"
    assert all(keys.count(f"\n| `{name}` |") == 1 for name in KEYS)
