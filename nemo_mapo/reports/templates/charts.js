// Draws every chart in the colours of the reader's scheme, again when that changes, and light on paper.
const dark = matchMedia("(prefers-color-scheme: dark)");
const buttons = [["zoom2d", "pan2d", "resetScale2d", "toImage"]];
const bar = matchMedia("(hover: none)").matches ? false : "hover";
const settings = {responsive: true, displaylogo: false, displayModeBar: bar, modeBarButtons: buttons};

function draw(scheme, width) {
  for (const place of document.querySelectorAll(".chart")) {
    const text = place.querySelector("script").textContent.replace(/(#\w{6}|rgba\([^)]*\))\|(#\w{6}|rgba\([^)]*\))/g, scheme);
    const chart = JSON.parse(text);
    // A finger that scrolls must not zoom.
    if (matchMedia("(pointer: coarse)").matches) chart.layout.dragmode = false;
    Plotly.react(place.firstElementChild, chart.data, {...chart.layout, width}, settings);
  }
}

const redraw = () => draw(dark.matches ? "$2" : "$1");
redraw();
dark.addEventListener("change", redraw);
addEventListener("beforeprint", () => draw("$1", 330));
addEventListener("afterprint", redraw);
