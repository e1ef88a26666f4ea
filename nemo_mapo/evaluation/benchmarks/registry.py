"""The layouts by name."""

from nemo_mapo.evaluation.benchmarks import mmar, mmau, mmau_pro, mmsu, own
from nemo_mapo.evaluation.benchmarks.items import Layout

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (mmau.LAYOUT, mmar.LAYOUT, mmsu.LAYOUT, mmau_pro.LAYOUT, own.LAYOUT)
}
