// What the pages of the widgets share. It stands before each of them, in one ES module (page.py).

const SVG_TAGS = "svg g rect circle path text image mask polyline line pattern defs filter".split(" ");

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
  if (["button", "input", "textarea"].includes(tag) || "tabindex" in attributes) {
    element.setAttribute("data-lm-suppress-shortcuts", "true");
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
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
