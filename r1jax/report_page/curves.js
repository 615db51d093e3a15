// The curves, drawn by plotly, in the page's own colours.

function plotData(chart, style) {
  const hue = (i) => style(`--c${i % 7}`);
  const shown = chart.unit === "share" ? "%{y:.1%}" : "%{y:.4~g}";
  if (chart.form === "bars") {
    return chart.bars.map((bar, i, all) => ({
      type: "bar", name: bar.label, x: bar.x.map((level) => `level ${level}`), y: bar.y,
      marker: { color: all.length > 1 && i === 0 ? style("--c6") : hue(0) }, hovertemplate: shown,
    }));
  }
  if (chart.form === "stack") {
    return chart.lines.map((line, i) => ({
      x: line.x, y: line.y, name: line.label, stackgroup: "moves", mode: "lines", hovertemplate: "%{y:.3~g} s",
      line: { width: 0.5, color: hue(i) }, fillcolor: hue(i),
    }));
  }
  if (chart.form === "versus") {
    return chart.lines.map((line, i) => ({
      x: line.x, y: line.y, name: line.label, mode: "lines+markers", hovertemplate: shown,
      line: { width: 2, color: hue(i), dash: line.label.endsWith("before") ? "dot" : "solid" }, marker: { size: 7, color: hue(i) },
    }));
  }
  const traces = [];
  chart.lines.forEach((line, i) => {
    const alone = line.x.length === 1;
    traces.push({
      x: line.x, y: line.y, mode: alone ? "markers" : "lines", hoverinfo: "skip", showlegend: false, legendgroup: line.label,
      line: { width: 1, color: hue(i) }, marker: { color: hue(i), size: 7 }, opacity: alone ? 1 : 0.3,
    });
    traces.push({
      x: line.x, y: line.smooth, customdata: line.y, mode: "lines", name: line.label, legendgroup: line.label,
      line: { width: 2.5, color: hue(i) }, hovertemplate: shown,
    });
  });
  chart.points.forEach((line, i) => {
    const reach = (side) => line[side].map((bound, j) => (bound === null ? 0 : Math.abs(bound - line.y[j])));
    traces.push({
      x: line.x, y: line.y, name: line.label, mode: "lines+markers", hovertemplate: shown,
      line: { width: 1.5, dash: "dot", color: hue(2 + i) }, marker: { size: 9, symbol: ["circle", "diamond"][i % 2], color: hue(2 + i) },
      error_y: { type: "data", symmetric: false, array: reach("high"), arrayminus: reach("low"), thickness: 1.5, width: 4,
        color: hue(2 + i), visible: line.low.some((bound) => bound !== null) },
    });
  });
  return traces;
}

function plotLayout(chart, data, style) {
  const axis = { gridcolor: style("--rule"), linecolor: style("--rule"), zeroline: false, automargin: true };
  const highest = Math.max(...data.flatMap((trace) => trace.y));
  const share = chart.unit === "share";
  return {
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: style("--text") },
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", colorway: [style("--c0")],
    margin: { l: 44, r: 10, t: 12, b: 30 }, barmode: "group", bargap: 0.35, bargroupgap: 0.08,
    xaxis: { ...axis, showgrid: false, ...(["bars", "versus"].includes(chart.form) ? { type: "category", title: { text: chart.axis, font: { size: 12.5 } } } : {
      title: { text: "step", standoff: 4, font: { size: 12.5 } }, unifiedhovertitle: { text: "step %{x}" },
      spikecolor: style("--muted"), spikethickness: 1, spikedash: "solid",
    }) },
    yaxis: { ...axis, rangemode: "tozero", tickformat: share ? ".3~%" : ",.6~g", nticks: 6,
      ...(share && highest > 0.4 && highest <= 1 ? { range: [0, 1.02] } : {}) },
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: 12.5 } },
    showlegend: data.filter((trace) => trace.showlegend !== false).length > 1,
    hovermode: "x unified", hoverlabel: { bgcolor: style("--card"), bordercolor: style("--rule"), font: { color: style("--text") } },
    // Dragging on a touch screen scrolls the page.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
  };
}

async function drawCurves(charts) {
  const plots = [...document.querySelectorAll(".plot")];
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(make("script", {}, await new Response(stream).text()));
  const computed = getComputedStyle(document.documentElement);
  const style = (name) => computed.getPropertyValue(name).trim();
  const draw = (plot) => {
    const chart = charts[plot.dataset.chart];
    const data = plotData(chart, style);
    return Plotly.react(plot, data, plotLayout(chart, data, style), { responsive: true, displayModeBar: false });
  };
  const visible = (plot) => !plot.closest("details:not([open])");
  for (const plot of plots.filter(visible)) await draw(plot);
  for (const details of document.querySelectorAll("details")) {
    details.addEventListener("toggle", () => details.open && details.querySelectorAll(".plot").forEach(draw));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.filter(visible).forEach(draw));
}

drawCurves(read("charts")).catch((error) => {
  document.querySelectorAll(".plot").forEach((plot) => plot.replaceChildren(`The curves could not be drawn: ${error}`));
});
