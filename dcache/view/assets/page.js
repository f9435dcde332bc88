// Draws each figure when it comes near the window, in the colours of the page, and again when those change.
"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const list = (name) => css(name).split(/\s+/);
  const figures = new Map(); // element of the plot to what is drawn there

  // Colours by role

  function colour(meta) {
    const among = (name, i) => list(name)[i % list(name).length];
    if (meta.role === "series") return meta.index < 0 ? css("--reference") : among("--series", meta.index);
    if (meta.role === "part") return among("--part", meta.index);
    if (meta.role === "commit") return css("--commit");
    return css("--soft");
  }

  function clear(hex) {
    return hex + "55";
  }

  function painted(trace) {
    const meta = trace.meta;
    if (!meta) return trace;
    if (meta.role === "scale") {
      const scale = [[0, css("--map-0")], [0.001, css("--map-1")], [0.5, css("--map-2")], [1, css("--map-3")]];
      const text = { color: css("--soft"), size: 12 };
      const title = { ...trace.colorbar.title, font: text };
      return { ...trace, colorscale: scale, colorbar: { ...trace.colorbar, title, tickfont: text } };
    }
    const c = colour(meta);
    const found = { ...trace, marker: { ...trace.marker, color: c } };
    if (trace.type === "violin") return { ...found, line: { color: c, width: 1.5 }, fillcolor: clear(c) };
    if (trace.type === "bar") return found;
    found.line = { width: meta.role === "front" ? 1.5 : 2, ...trace.line, color: c };
    for (const bar of ["error_x", "error_y"]) if (trace[bar]) found[bar] = { ...trace[bar], color: clear(c) };
    return found;
  }

  function axis(given, title) {
    return {
      gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), tickcolor: css("--line"),
      ticks: "outside", ticklen: 4, automargin: true, ...given, title: { ...title, ...given?.title, font: { size: 12, color: css("--soft") } },
    };
  }

  // On a phone the colour scale stands below the plot, which needs the width
  function lying(scale, { zmax, colorbar }) {
    const ends = colorbar.ticktext ? [colorbar.ticktext[0], colorbar.ticktext.at(-1)] : ["0", zmax.toPrecision(2)];
    const bar = document.createElement("i");
    bar.style.background = `linear-gradient(90deg, ${["--map-1", "--map-2", "--map-3"].map(css).join(", ")})`;
    scale.replaceChildren(ends[0], bar, `${ends[1]} ${colorbar.title.text}`);
  }

  function dressed(variant, narrow, scale) {
    const given = variant.layout;
    const border = { color: css("--ink"), width: 1 };
    const layout = {
      ...given,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 12 : 13, color: css("--ink") },
      margin: { l: narrow ? 44 : 60, r: narrow ? 12 : 24, t: 34, b: 54, ...given.margin },
      hoverlabel: {
        bgcolor: css("--ink"), bordercolor: css("--ink"), align: "left",
        font: { color: css("--paper"), size: 13, family: getComputedStyle(document.body).fontFamily },
      },
      legend: { ...given.legend, orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", itemwidth: 30, font: { size: 12 } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--line"), activecolor: css("--soft") },
      dragmode: coarse ? false : "zoom", // a finger scrolls the page
      xaxis: axis(given.xaxis, {}), yaxis: axis(given.yaxis, { standoff: 8 }),
      annotations: (given.annotations || []).map((each) => ({ ...each, font: { ...each.font, color: css("--soft") } })),
      shapes: (given.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, ...border } })),
    };
    const data = variant.data.map(painted);
    const map = data.find((trace) => trace.colorbar);
    scale.hidden = !(narrow && map);
    if (narrow && map) {
      lying(scale, map);
      map.showscale = false;
    }
    return { data, layout };
  }

  // Figures

  function chosen(figure) {
    return [...figure.querySelectorAll("select")].map((select) => select.value).join("-");
  }

  async function draw(plot) {
    const state = figures.get(plot);
    state.wanted = true;
    try {
      state.variants ||= JSON.parse(document.getElementById(plot.dataset.source).textContent);
      const variant = state.variants[chosen(state.figure)];
      hideTip();
      if (!variant) {
        Plotly.purge(plot);
        plot.replaceChildren(Object.assign(document.createElement("p"), { textContent: "Not recorded." }));
      } else {
        if (!state.variant) plot.replaceChildren();
        const { data, layout } = dressed(variant, plot.clientWidth < 600, state.scale);
        plot.style.height = `${layout.height}px`;
        await Plotly.react(plot, data, layout, {
          responsive: true, displaylogo: false, scrollZoom: false, displayModeBar: coarse ? false : "hover",
          showSendToCloud: false, plotlyServerURL: "", // a button that uploads the figure, on by default since plotly 7
          modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
          toImageButtonOptions: { format: "svg", filename: plot.id },
        });
        if (!state.variant) {
          plot.on("plotly_hover", (event) => showTip(plot, event));
          plot.on("plotly_unhover", hideTip);
        }
      }
      state.variant = variant;
      plot.dataset.drawn = chosen(state.figure) || "only";
    } catch (error) {
      plot.replaceChildren(Object.assign(document.createElement("p"), { textContent: `This figure could not be drawn: ${error}` }));
      plot.dataset.failed = String(error);
      console.error(error);
    }
  }

  // The label of a cell of a map; everything in it is set as text

  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");

  function hideTip() {
    tip.hidden = true;
  }

  function shown(token) {
    return token.replaceAll("\n", "↵").replaceAll(" ", "␣");
  }

  function token(found, step, position) {
    const n = found.prompt.length;
    if (position < n) return found.prompt[position] === "" ? [null, "an image"] : [found.prompt[position], ""];
    const past = (found.events[position] || []).filter(([at]) => at <= step);
    const [at, text] = past.at(-1) || [-1, "[MASK]"];
    const seen = found.seen[step][position];
    if (text !== "[MASK]") return [text, at === step ? "committed now" : `committed in step ${at}`];
    return seen ? [seen[0], "candidate, still masked"] : [null, "masked"];
  }

  function cell(found, step, position, layers) {
    const [text, what] = token(found, step, position);
    const seen = found.seen[step][position];
    const percent = (x) => `${(100 * x).toFixed(0)} %`;
    const rows = found.rows[step];
    const lines = [
      `${layers} of ${found.layers} layers computed`,
      `step: ${rows} of ${found.length} rows (${percent(rows / found.length)}), ${found.ms[step].toFixed(1)} ms`,
      `refresh: ${found.refresh[step] ? "yes" : "no"}${found.again[step] ? ", with a second pass" : ""}`,
      ...(seen ? [`confidence ${seen[1].toFixed(3)}`] : []),
    ];
    const head = Object.assign(document.createElement("b"), { textContent: `step ${step}, position ${position}` });
    const code = Object.assign(document.createElement("code"), { textContent: text === null ? "" : `“${shown(text)}”` });
    const where = `${found.labels[position]}\n`;
    return [head, where, ...(text === null ? [] : [code]), `${text !== null && what ? " " : ""}${what}\n${lines.join("\n")}`];
  }

  function showTip(plot, { event, points }) {
    const found = figures.get(plot).variant?.tip;
    const point = points.find((each) => each.data.type === "heatmap");
    if (!found || !point || !event) return;
    tip.replaceChildren(...cell(found, point.y, point.x, point.z));
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const right = event.clientX + 16 + width < innerWidth;
    const x = right ? event.clientX + 16 : event.clientX - 16 - width;
    const y = Math.min(event.clientY + 16, innerHeight - height - 8);
    tip.style.left = `${Math.max(8, x)}px`;
    tip.style.top = `${Math.max(8, y)}px`;
  }

  // Start

  document.body.append(tip);
  const near = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (isIntersecting && !figures.get(target).wanted) draw(target);
      }
    },
    { rootMargin: "400px 0px" },
  );
  for (const figure of document.querySelectorAll("figure")) {
    const plot = figure.querySelector(".plot");
    const scale = Object.assign(document.createElement("div"), { className: "scale", hidden: true });
    plot.after(scale);
    figures.set(plot, { figure, scale, variants: null, variant: null, wanted: false });
    for (const select of figure.querySelectorAll("select")) select.addEventListener("change", () => draw(plot));
    near.observe(plot);
  }
  const paintSwatches = () => {
    for (const each of document.querySelectorAll(".swatch")) {
      each.style.background = colour({ role: "series", index: Number(each.dataset.index) });
    }
  };
  paintSwatches();
  const redraw = (all) => {
    paintSwatches();
    for (const [plot, state] of figures) if (all || state.wanted) draw(plot);
  };
  dark.addEventListener("change", () => redraw(false));
  addEventListener("beforeprint", () => redraw(true));
  addEventListener("scroll", hideTip, { passive: true });
})();
