// The page of LayoutStudio around its editor (layout_studio.py), after elements.js.
//
// In reading order: 1 the sliders · 2 the panel: build, draw, what is sent to Python.
//
// The settings are the page's, and go to Python with each message. Pictures, and what is said of
// them, are Python's. While a cell runs, Python answers nothing: the page says that it waits.

// ------------------------------------------------------------------ 1 the sliders

const PATIENCE = 700; // milliseconds
const WAITS = "Python is busy with another cell; what you clicked comes when that is done. "
  + "(After a restart of the kernel run the cell of this studio again.)";
const SLIDERS = [ // name, label, least, most, step, what it is
  ["seed", "seed", 0, 999, 1, "Of the noise a picture begins with: the same seed is the same noise"],
  ["steps", "steps", 1, 100, 1, "Denoising steps: more take longer"],
  ["guidance_scale", "guidance γ", 1, 15, 0.5, "How strongly prompts steer (classifier-free guidance); 1 is no guidance"],
  ["layered_fraction", "layered part t0", 0, 1, 0.05, "Which part of the steps is layered; the caption has the rest"],
  ["strength", "strength of ξ", 0, 3, 0.1, "Factor on the method's vision guidance; 0 is none"],
];
const NEEDS = { layered_fraction: "layered", strength: "guided" }; // what a method must be
const VIEWS = {
  picture: "The picture alone",
  asked: "The picture under the boxes that were asked for",
  found: "The boxes asked for and, dashed, what the detector found",
};

// ------------------------------------------------------------------ 2 the panel

class Panel {
  constructor(model, el) {
    this.model = model;
    this.waits = false; // for Python
    this.line = new Line(model, (there) => { this.waits = !there; this.drawJob(); });
    this.build(el);
    this.leaveTheme = followTheme(this.root, el);
    this.heard = {
      "change:settings": () => this.drawSettings(),
      "change:live": () => this.drawJob(),
      "change:follow": () => this.drawJob(),
      "change:job": () => this.drawJob(),
      "change:shown": () => this.drawShown(),
      "change:strip": () => this.drawStrip(),
      "msg:custom": (message) => this.line.hear(message),
    };
    for (const [name, listener] of Object.entries(this.heard)) model.on(name, listener);
    this.drawSettings();
    this.drawJob();
    this.drawStrip();
    this.drawShown();
  }

  get busy() {
    return this.model.get("job").share != null;
  }

  // ---------------------------------------------------------------- build: once

  build(el) {
    this.strip = h("div", { class: "strip", role: "group", "aria-label": "The last pictures" });
    this.root = h("div", {
      class: "lrd-widget lrd-fields lrd-panel", role: "group", "aria-label": "Studio",
      onkeydown: (event) => event.stopPropagation(), // not the notebook's
    }, this.buildControls(), this.buildResult(), this.strip);
    el.append(this.root);
  }

  buildControls() {
    this.sliders = SLIDERS.map((slider) => this.buildSlider(...slider));
    const tip = "How the layout is drawn: see METHODS";
    this.method = h("select", { "aria-label": "method", title: tip, onchange: () => this.takeMethod(this.method.value) },
      ...Object.keys(this.model.get("methods")).map((name) => h("option", {}, name)));
    this.renderButton = h("button", {
      type: "button", class: "primary", title: "Draw the layout as it is now", onclick: () => this.tell({ kind: "render" }),
    }, "Render");
    this.cancelButton = h("button", {
      type: "button", class: "framed", title: "Stop after the next step", onclick: () => this.tell({ kind: "cancel" }),
    }, "Cancel");
    this.liveButton = h("button", {
      type: "button", class: "framed", title: "Render after each pause in editing",
      onclick: () => { this.model.set("live", !this.model.get("live")); this.tell({ kind: "set" }); },
    }, "Live");
    this.followButton = h("button", {
      type: "button", class: "framed", onclick: () => this.tell({ kind: "follow", on: !this.model.get("follow").on }),
    }, "Follow");
    this.why = h("small", { class: "why" });
    this.bar = h("progress", { max: 1, "aria-label": "Progress" });
    this.message = h("p", { class: "message", role: "status", "aria-live": "polite" });
    return h("section", { class: "controls", "aria-label": "Settings" },
      h("div", { class: "sliders" }, ...this.sliders.map(({ row }) => row),
        h("label", { class: "slider", title: tip }, h("span", {}, "method"), this.method)),
      h("div", { class: "go" }, this.renderButton, this.cancelButton, this.liveButton, this.followButton, this.bar),
      this.why, this.message);
  }

  /** A setting: by hand with the slider, or as a number. */
  buildSlider(name, label, min, max, step, tip) {
    const about = { min, max, step, title: tip };
    const take = (value) => this.take({ [name]: clamped(value, min, max, step) });
    const range = h("input", {
      type: "range", ...about, "aria-label": label,
      oninput: () => take(range.value), onchange: () => this.tell({ kind: "set" }),
    });
    const number = h("input", {
      type: "number", ...about, "aria-label": `${label}, as a number`,
      onchange: () => { if (number.value) take(number.value); this.drawSettings(); this.tell({ kind: "set" }); },
    });
    return { name, range, number, row: h("div", { class: "slider", title: tip }, h("span", {}, label), range, number) };
  }

  buildResult() {
    this.views = Object.entries(VIEWS).map(([name, tip]) => h("button", {
      type: "button", title: tip, "data-view": name, onclick: () => this.tell({ kind: "look", view: name, word: "" }),
    }, name));
    this.boxesButton = h("button", {
      type: "button", class: "framed", title: "Draw the boxes of what is found in this picture (Undo brings yours back)",
      onclick: () => this.tell({ kind: "boxes" }),
    }, "Take boxes");
    this.figure = h("div", { class: "figure" });
    this.below = h("p", { class: "below" });
    this.words = h("div", { class: "words", role: "group", "aria-label": "Where the model looks for a word" });
    this.told = h("p", { class: "told" });
    this.ious = h("table", { class: "ious" });
    this.remarks = h("ul", { class: "remarks" });
    return this.result = h("section", { class: "result", "aria-label": "Picture" },
      h("div", { class: "views" }, h("div", { class: "group" }, ...this.views), this.boxesButton),
      this.figure, this.below, this.words, this.told, this.ious, this.remarks);
  }

  // ---------------------------------------------------------------- draw: what changed

  drawSettings() {
    const settings = this.model.get("settings"), method = this.model.get("methods")[settings.method];
    for (const { name, range, number, row } of this.sliders) {
      range.value = settings[name];
      number.value = Number(settings[name].toFixed(2)); // 15/51 as 0.29
      const off = name in NEEDS && !method[NEEDS[name]];
      range.disabled = number.disabled = off;
      row.classList.toggle("off", off);
    }
    this.method.value = settings.method;
  }

  drawJob() {
    const { text = "", share = null, bad = false } = this.model.get("job"), live = this.model.get("live");
    this.renderButton.disabled = this.busy && !live;
    this.cancelButton.disabled = !this.busy && !this.waits;
    this.liveButton.setAttribute("aria-pressed", live);
    const { on = false, why = "" } = this.model.get("follow");
    this.followButton.setAttribute("aria-pressed", on);
    this.followButton.title = `The picture follows while a box is dragged, in few steps; when you let go, in all${why && ` (off: ${why})`}`;
    this.why.textContent = why && `Follow is off: ${why}.`;
    this.bar.style.visibility = this.busy ? "visible" : "hidden";
    this.bar.value = share ?? 0;
    const message = this.waits ? WAITS : text;
    if (this.message.textContent !== message) this.message.textContent = message;
    this.message.classList.toggle("bad", bad && !this.waits);
  }

  drawShown() {
    const { view = "picture", word = "", svg = "", text = "", told = "", ious = [], words = [], remarks = [], boxes, name, quick = false } = this.model.get("shown");
    for (const button of this.views) {
      button.disabled = !svg;
      button.setAttribute("aria-pressed", !word && button.dataset.view === view);
    }
    this.boxesButton.hidden = !boxes;
    if (svg) this.figure.innerHTML = svg; // Python escapes what is in it
    else this.figure.replaceChildren(h("p", { class: "empty" }, "Press Render to see the picture here."));
    this.below.textContent = text;
    this.told.textContent = told;
    this.result.classList.toggle("quick", quick);
    this.drawWords(words, word, view);
    this.ious.replaceChildren(...(ious.length ? [h("caption", {}, "IoU with what was found"), ...ious.map(lineOf)] : []));
    this.remarks.replaceChildren(...remarks.map((remark) => h("li", {}, remark)));
    for (const each of this.strip.children) each.setAttribute("aria-pressed", each.dataset.name === name);
  }

  /** The buttons stay the elements they are: the pressed one keeps the focus. */
  drawWords(words, pressed, view) {
    const there = [...this.words.children].map((each) => each.textContent);
    if (there.join(" ") !== words.join(" ")) {
      this.words.replaceChildren(...words.map((word) => h("button", {
        type: "button", title: `Where does the model look for “${word}”?`,
        onclick: (event) => {
          const again = event.currentTarget.getAttribute("aria-pressed") === "true";
          this.tell({ kind: "look", view: this.model.get("shown").view, word: again ? "" : word });
        },
      }, word)));
    }
    for (const each of this.words.children) each.setAttribute("aria-pressed", each.textContent === pressed);
  }

  drawStrip() {
    this.strip.replaceChildren(...this.model.get("strip").map(({ name, uri, label, about }) => h("button", {
      type: "button", title: about, "data-name": name, onclick: () => this.tell({ kind: "show", name }),
    }, h("img", { src: uri, alt: about }), h("span", {}, label))));
  }

  // ---------------------------------------------------------------- what is sent to Python

  take(changes) {
    this.model.set("settings", { ...this.model.get("settings"), ...changes });
  }

  /** A method brings the layered part that it works best with. */
  takeMethod(method) {
    const { layered, layered_fraction } = this.model.get("methods")[method];
    this.take({ method, ...(layered && { layered_fraction }) });
    this.tell({ kind: "set" });
  }

  tell(message) {
    this.line.send({ ...message, settings: this.model.get("settings"), live: this.model.get("live") }, PATIENCE);
  }

  close() {
    this.line.close();
    this.leaveTheme();
    for (const [name, listener] of Object.entries(this.heard)) this.model.off(name, listener);
  }
}

/** What was put in as a number of the slider: whole where its steps are. */
function clamped(value, min, max, step) {
  const number = Math.min(Math.max(Number(value), min), max);
  return step === 1 ? Math.round(number) : number;
}

/** A line of the table: null is a prompt that the detector does not know. */
function lineOf({ prompt, colour, iou }, index) {
  const unknown = "The detector knows no thing in this prompt";
  return h("tr", { title: iou == null ? unknown : null },
    h("td", {}, h("span", { class: "chip", style: `background:${colour};color:${inkOn(colour)}` }, index + 1)),
    h("td", {}, prompt),
    h("td", {}, iou != null && h("span", { class: "bar" }, h("span", { style: `width:${100 * iou}%` }))),
    h("td", {}, iou == null ? "unknown" : iou.toFixed(2)));
}

export default {
  render({ model, el }) {
    const panel = new Panel(model, el);
    return () => panel.close();
  },
};
