"""Colours, style sheet and HTML pieces shared by the run report and the ablation page."""

from html import escape

OMEGA = "\N{GREEK SMALL LETTER OMEGA}\N{COMBINING TILDE}"
NU = "\N{GREEK SMALL LETTER NU}\N{COMBINING TILDE}"
MISSING = "\N{EN DASH}"

INK = "#1f2933"
MUTED = "#6b7280"
GRID = "#e4e2dd"

# One colour, one meaning, on every figure; the hues are Okabe and Ito's, which colour-blind readers tell apart.
ACCURACY = "#0072b2"
SILENT = "#8a8f98"
REWARD = "#0b5c8a"
EARLY = "#e69f00"
LATE = "#d55e00"
WHOLE = "#9a6a3a"
LENGTH = "#009e73"
WORDS = "#7a5195"
BEFORE = "#8a8f98"
AFTER = "#d55e00"
LOSS = "#334e68"
KL = "#7a5195"
ENTROPY = "#0072b2"

PHASES = ("#0072b2", "#56b4e9", "#e69f00", "#f0d264", "#009e73", "#b08bbf", "#d55e00", "#8a8f98")
"""Phases of a training step, bottom to top of the stack."""

VARIANTS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7a5195")
"""Variants of an ablation other than the baseline, which is `BEFORE`'s grey."""

STYLE = """
:root{--ink:#1f2933;--muted:#5b6470;--line:#e4e2dd;--paper:#faf9f7;--card:#fff;--accent:#0b5c8a;--warn:#b45309}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);line-height:1.5;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif;font-size:16px}
main{max-width:1160px;margin:0 auto;padding:28px 20px 64px}
h1{font-size:1.65rem;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:44px 0 4px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:0}
p{margin:.35em 0;max-width:74ch}
.sub,.lead,figcaption,.note{color:var(--muted)}
.sub{font-size:.92rem}.lead{font-size:.95rem;margin-bottom:14px}.note{font-size:.86rem}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 0 0;font-size:.9rem}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(176px,1fr));gap:12px;margin:22px 0 14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.card .name{font-size:.8rem;color:var(--muted)}
.card .value{font-size:1.16rem;font-weight:600;line-height:1.35;font-variant-numeric:tabular-nums;white-space:nowrap}
.card .value .from{color:var(--muted);font-weight:400}
.card .hint{font-size:.78rem;color:var(--muted);line-height:1.35}
.box{border:1px solid var(--line);border-left-width:4px;border-radius:8px;padding:10px 16px;margin:12px 0;
background:var(--card)}
.box.warn{border-left-color:var(--warn);background:#fffaf1}.box.fine{border-left-color:#0f8a66}
.box ul{margin:6px 0;padding-left:1.15em}.box li{margin:6px 0}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px 12px;
min-width:0}
figure h3{margin-bottom:4px}
figure svg{display:block;width:100%;height:auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
figcaption{font-size:.86rem;line-height:1.45;margin-top:6px}
details{margin-top:12px}summary{cursor:pointer;color:var(--accent)}
pre{overflow:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;
font-size:.82rem;line-height:1.45}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem;background:var(--card);min-width:100%}
th,td{padding:7px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{font-weight:600;color:var(--muted);font-size:.84rem;
vertical-align:bottom;white-space:normal}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.9rem;margin:4px 0 12px}
.key i{display:inline-block;width:18px;height:4px;border-radius:2px;margin-right:6px;vertical-align:middle}
td small{color:var(--muted);display:block;font-size:.8rem}
@media(max-width:760px){main{padding:18px 12px 48px}.grid{grid-template-columns:minmax(0,1fr)}
.cards{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}.card{padding:10px 11px}.card .value{font-size:1.08rem}
figure{padding:12px 8px 10px}figure h3,figcaption{padding:0 4px}}
@media(max-width:350px){.cards{grid-template-columns:minmax(0,1fr)}}
@media print{body{background:#fff}figure,.card,.sample{break-inside:avoid}nav{display:none}}
"""


def page(*, title: str, body: str, style: str = "") -> str:
    """A whole self-contained document; `title` is plain text, `body` and `style` are taken as they are."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def figure_html(*, title: str, svg: str, caption: str) -> str:
    """A chart with its heading and how to read it; `title` and `caption` are plain text."""
    return f"<figure>\n<h3>{escape(title)}</h3>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def grid_html(items: list[str]) -> str:
    """Lay figures out two abreast, one below the other on a narrow screen."""
    return '<div class="grid">\n' + "\n".join(items) + "\n</div>"
