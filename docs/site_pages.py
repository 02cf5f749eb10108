"""A hook of MkDocs: pages from files outside docs/, and links to files that the site does not have.

MkDocs calls `on_files` and `on_page_markdown`; see `hooks` in mkdocs.yml.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: Files of the repository that are pages, and their names in the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    **{f"notebooks/{path.name}": f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))},
}
#: The link of a Markdown text or image: its text, and its target.
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


@event_priority(100)  # before the plugin for notebooks, which takes those that are in the list
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of `PAGES` to the files of the site."""
    for source, name in PAGES.items():
        if source == name:  # the plugin for notebooks reads files of a folder
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
        else:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Return a page whose links point to pages of the site; the text of a link to any other file is its path."""
    names = {name: source for source, name in PAGES.items()}
    folder = posixpath.dirname(names.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def replaced(match: re.Match[str]) -> str:
        image, text, address = match.groups()
        target, mark, anchor = address.partition("#")
        if not target or "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        name = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(name) is None:
            return f"{text} (`{path}` in the repository)" if text != path else f"`{path}`"
        link = posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({link}{mark}{anchor})"

    return LINK.sub(replaced, markdown)
