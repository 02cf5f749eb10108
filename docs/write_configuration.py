"""Write docs/configuration.md from configs/ and the comments in them, by `python docs/write_configuration.py`."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
PAGE = HERE / "configuration.md"
COMMANDS = ("train", "predict", "segment", "evaluate", "tune", "export", "submit", "inspect", "convert")

HEAD = """\
# Configuration

<!-- Written by docs/write_configuration.py from configs/ and the comments in them; a test compares. -->

Every key, its default and its description. `cellmap-train --cfg job` prints those of a run, with what you override;
`${...}` takes the value of another key, and `???` must be given. A comment also holds for the lines below it that have
none. A group is chosen as in `model=unet2d`, a key is changed as in `data.batch_size=8`.

Files of your own go into a folder of the same form, which `--config-dir my_configs` names: a new option of a group is
`my_configs/model/mine.yaml`, an experiment is `my_configs/experiment/mito.yaml` with `# @package _global_` as its first
line. An unknown key is an error with a suggestion, unless `${...}` refers to it; so is an
argument that a `_target_` does not take. `voxel_size` is another name of `scale`, and `validate` and `validation` of
`val`. A callback or logger of your own is a new name with a `_target_`:

```yaml
callbacks:
  lr:
    _target_: lightning.pytorch.callbacks.LearningRateMonitor
```

On the command line, `~callbacks` and `~logger` leave a group out. `ckpt`, `resume` and `init_from` take any path;
another value with `=`, brackets or blanks in it needs its own quotes inside those of the shell: `"name='a=b'"`. In a
file, an option of a group is chosen in its defaults, `- override /model: unet_small`, and not by `model: unet_small`.

With LightningCLI instead of Hydra: [lightning_cli.md](lightning_cli.md).
"""


def comment_of(lines: list[str], first: int) -> str:
    """The comment lines right above a line."""
    last = first
    while first > 0 and re.match(r"\s*#(?! @package)", lines[first - 1]):
        first -= 1
    return " ".join(line.strip().lstrip("#").strip() for line in lines[first:last])


def header_of(text: str) -> str:
    """The first sentence of the comment with which a file begins."""
    lines = text.splitlines()
    if lines and lines[0].startswith("# @package"):
        lines = lines[1:]
    found = " ".join(re.findall(r"# ?(.*)", "\n".join(lines[: len(lines) - len(list(_after_comments(lines)))])))
    return re.split(r"(?<=\.)\s", found)[0].strip()


def _after_comments(lines: list[str]) -> Iterator[str]:
    begun = False
    for line in lines:
        begun = begun or not line.startswith("#")
        if begun:
            yield line


def rows(text: str, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, default and comment of every value of a file."""
    lines = text.splitlines()
    top = next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)

    def walk(node: yaml.Node, where: str, above: str) -> Iterator[tuple[str, str, str]]:
        for key, value in node.value:
            name = f"{where}{key.value}"
            if name in ("hydra", "defaults"):
                continue
            line = key.start_mark.line
            comment = "" if line <= top else comment_of(lines, line)
            if isinstance(value, yaml.MappingNode) and not value.flow_style and value.value:
                yield from walk(value, f"{name}.", comment)
                continue
            last = lines[value.end_mark.line][value.end_mark.column :] if value.end_mark.line < len(lines) else ""
            beside = re.match(r"\s+#\s*(.*)", last)
            source = text[value.start_mark.index : value.end_mark.index].strip()
            yield prefix + name, source or "null", " ".join(filter(None, (above, comment, beside[1] if beside else "")))
            above = ""

    content = yaml.compose(text)
    if content is not None:  # a file of comments alone
        yield from walk(content, "", "")


def escaped(text: str) -> str:
    """The same without meaning for Markdown."""
    return re.sub(r"([|<>*\[\]])", r"\\\1", text)


def table(text: str, prefix: str = "") -> str:
    """The rows of a file."""
    out = ["| key | default | |", "|---|---|---|"]
    for key, default, comment in rows(text, prefix):
        out.append(f"| `{key}` | `{default.replace('|', chr(92) + '|')}` | {escaped(comment)} |")
    return "\n".join(out)


def page() -> str:
    """The text of the page."""
    parts = [HEAD]
    for name in COMMANDS:
        text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
        parts.append(f"## cellmap-{name}\n\n{table(text)}\n")
        if name != "train":
            continue
        for group in sorted(p for p in CONFIGS.iterdir() if p.is_dir()):
            options = {p.stem: p.read_text(encoding="utf-8") for p in sorted(group.glob("*.yaml"))}
            default = next(e[group.name] for e in yaml.safe_load(text)["defaults"] if group.name in e)
            parts.append(f"### {group.name}\n")
            parts.append("| option | |\n|---|---|")
            for option, content in options.items():
                mark = " (default)" if option == default else ""
                parts.append(f"| `{group.name}={option}`{mark} | {escaped(header_of(content))} |")
            parts.append("")
            if group.name == "experiment":
                continue
            for option, content in options.items():
                parts.append(f"`{group.name}={option}`")
                if not any(rows(content)):
                    parts[-1] += " sets nothing.\n"
                    continue
                package = re.match(r"# @package (\w+)", content)
                parts[-1] += derived(content) + ":\n"
                parts.append(table(content, f"{package[1] if package else group.name}.") + "\n")
    return "\n".join(parts)


def derived(text: str) -> str:
    """Return the beginning of the text about an option that changes others."""
    base = (yaml.safe_load(text) or {}).get("defaults")
    return f" is `{base[0]}` with" if base else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
