"""Upstream's web pages, patched whatever the tests before have undone."""

import pytest


@pytest.fixture
def patched_pages():
    """Upstream's pages as the plugin leaves them."""
    pytest.importorskip("gradio")
    import llamafactory.webui.interface as interface

    from llamafactory_ddm.integration.patches import table

    table.after_web_pages(interface)
    return interface
