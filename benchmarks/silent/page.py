"""The matrix as text and as one HTML page that needs nothing from elsewhere."""

from html import escape

from silent.exhibits import NAMES, open_exhibit, title

STATES = {"right": "right", "wrong": "WRONG", "warned": "warned", "cannot": "cannot", "not applicable": "n/a"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --right: #1a7f37; --wrong: #c0232c; --warned: #9a6700; --other: #777 }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line) }
tbody th { font-weight: 500; min-width: 14rem } .right b { color: var(--right) } .wrong b { color: var(--wrong) }
.warned b { color: var(--warned) } .cannot b, .na b { color: var(--other) } summary { cursor: pointer }
td { min-width: 6.5rem; max-width: 16rem }
td p, th p { margin: .2rem 0; font-size: .85em; font-weight: 400 } pre { white-space: pre-wrap; font-size: .9em }
"""


def cell(verdict: dict | None, unit: str) -> str:
    """A verdict in few characters: right, or how far off."""
    if verdict is None:
        return "not run"
    state, size = STATES[verdict["state"]], verdict["size"]
    if verdict["state"] not in ("wrong", "warned") or size is None:
        return state
    if isinstance(size, str):
        return f"{state} {size}"
    return f"{state} {size:.0%}" if unit.startswith("share") else f"{state} {size:.3g} {unit}"


def text(matrix: dict) -> str:
    """A table for a terminal, with the versions below it."""
    rows = [["exhibit", *matrix]]
    for name in [name for name in NAMES if any(name in column["exhibits"] for column in matrix.values())]:
        unit = open_exhibit(name).UNIT
        rows.append([name, *(cell(column["exhibits"].get(name), unit) for column in matrix.values())])
    rows.append(["wrong", *(str(sum(v["state"] == "wrong" for v in c["exhibits"].values())) for c in matrix.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.insert(-1, lines[1])
    notes = [f"{name}: {c['versions']}; {c['about']}; {c['seconds']:.0f} s; {c['date']}" for name, c in matrix.items()]
    return "\n".join([*lines, "", *notes])


def markdown(matrix: dict, trainers: tuple[str, ...], exhibits: tuple[str, ...] = NAMES) -> str:
    """A table for a document: some columns and rows, units at the end, and in the last row the faults of all rows."""
    lines = []
    for name in exhibits:
        unit = open_exhibit(name).UNIT
        cells = [cell(matrix[trainer]["exhibits"].get(name), unit) for trainer in trainers]
        lines.append([f"`{name}`", *(x.replace("WRONG", "**wrong**").removesuffix(f" {unit}") for x in cells), unit])
    states = [[verdict["state"] for verdict in matrix[trainer]["exhibits"].values()] for trainer in trainers]
    counts = (f"{found.count('wrong')}, {found.count('warned')}" for found in states)
    lines.append(["wrong without, with a warning", *counts, f"of {len(NAMES)}"])
    head = ["exhibit", *({"trl": "TRL"}.get(name, name) for name in trainers), "unit"]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(x)} |" for x in lines)])


def html(matrix: dict) -> str:
    """The page: a row for each exhibit with its story, a column for each trainer."""
    head = "".join(f"<th scope=col>{escape(name)}<p>{escape(c['versions'])}</p></th>" for name, c in matrix.items())
    body = []
    for name in NAMES:
        exhibit = open_exhibit(name)
        story = (exhibit.__doc__ or "").strip().split("\n", 1)[1].strip()
        cells = []
        for column in matrix.values():
            verdict = column["exhibits"].get(name)
            kind = {"not applicable": "na"}.get(verdict["state"], verdict["state"]) if verdict else "na"
            detail = f"<p>{escape(verdict['text'])}</p>" if verdict else ""
            cells.append(f"<td class={kind}><b>{escape(cell(verdict, exhibit.UNIT))}</b>{detail}</td>")
        body.append(f"<tr><th scope=row><details><summary>{escape(title(exhibit))}</summary><p>{escape(story)}</p>"
                    f"<p>python benchmarks/silent --exhibit {name}</p></details></th>{''.join(cells)}</tr>")
    notes = "".join(f"<li><b>{escape(name)}</b>: {escape(c['about'])}; {escape(c['versions'])}; "
                    f"{escape(c['machine'])}; {c['seconds']:.0f} s; {escape(c['date'])}</li>"
                    for name, c in matrix.items())
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>Silent bugs</title>
<style>{STYLE}</style>
<h1>Silent bugs</h1>
<p>The worst faults of fine-tuning raise no error and print a falling loss. Each row is one of them; each column is a
trainer as it came out when it was asked from outside. <b>WRONG</b> says how far off; <b>warned</b>: the
same, with a message that names it; <b>cannot</b>: it refuses, or offers
no way to do what is asked. Open a row for its story.</p>
<div class=wide><table><thead><tr><th scope=col>exhibit</th>{head}</tr></thead><tbody>
{chr(10).join(body)}
</tbody></table></div>
<h2>How each was run</h2><ul>{notes}</ul>
</html>
"""
