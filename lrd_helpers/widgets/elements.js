// What the pages of the widgets share. It stands before each of them, in one ES module (page.py).

const SVG_TAGS = "svg g rect circle ellipse path text image mask polyline line pattern defs filter".split(" ");

/** An element. `on…` are listeners, other attributes are left out where null or false. */
function h(tag, attributes = {}, ...children) {
  const element = SVG_TAGS.includes(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value != null && value !== false) element.setAttribute(name, value);
  }
  // Notebooks take single keys for themselves (x cuts the cell) unless the focused element itself
  // says no.
  if (["button", "input", "textarea", "select"].includes(tag) || "tabindex" in attributes) {
    element.setAttribute("data-lm-suppress-shortcuts", "true");
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

const randomName = () => Math.random().toString(36).slice(2, 10);

/** Black or white, whichever is read more easily on #rrggbb (WCAG): as `ink_on` of Python. */
function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16) / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) ? "#000000" : "#ffffff";
}

/** Messages to Python. Each has a number, and Python answers with it. `heard` is called with true
 *  when the last message is answered, with false when no answer has come in time. */
class Line {
  constructor(model, heard) {
    this.model = model;
    this.heard = heard;
  }

  /** Send a message, and wait so many milliseconds for the answer; gives the message's number. */
  send(message, patience) {
    this.number = randomName();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.heard(false), patience);
    try {
      this.model.send({ ...message, number: this.number });
    } catch {
      this.heard(false); // the line itself is closed
    }
    return this.number;
  }

  /** A message of Python's: perhaps the answer. */
  hear({ kind, number }) {
    if (kind !== "received" || number !== this.number) return;
    clearTimeout(this.timer);
    this.heard(true);
  }

  close() {
    clearTimeout(this.timer);
  }
}

/** Whether what lies behind `element` is dark, whatever the notebook calls its themes. */
function standsOnDark(element) {
  for (let node = element; node; node = node.parentElement) {
    const [red, green, blue, alpha = 1] = (getComputedStyle(node).backgroundColor.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
    if (alpha > 0.5) return 0.3 * red + 0.6 * green + 0.1 * blue < 128;
  }
  const named = document.documentElement.getAttribute("theme"); // Colab's
  return named ? named === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** `root` has the theme of what lies behind `el`, also when that changes; returns what ends this. */
function followTheme(root, el) {
  const paint = () => { root.dataset.theme = standsOnDark(el.parentElement ?? el) ? "dark" : "light"; };
  requestAnimationFrame(paint); // the page shows `el` a moment later
  const themes = new MutationObserver(paint);
  for (const node of [document.documentElement, document.body]) themes.observe(node, { attributes: true });
  return () => themes.disconnect();
}
