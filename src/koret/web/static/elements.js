// Making elements: text is only ever set as text.

export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Arrow keys move the focus along a list; the others leave it alone.
export function moveWithin(items, event, back, forward) {
  const place = items.indexOf(document.activeElement);
  if (place < 0 || ![back, forward].includes(event.key)) return false;
  const next = items[place + (event.key === forward ? 1 : -1)];
  if (next) next.focus();
  event.preventDefault();
  return true;
}
