// Addresses in an answer: which may be links, and where they end.

const BARE_URL = /https?:\/\/[^\s<>"`[\]|*]{1,2049}/y;
const ANGLE_URL = /<((?:https?:|mailto:)[^\s<>]{1,2048})>/y;
const PROTOCOLS = ["http:", "https:", "mailto:"];
const LONGEST_LINK = 1000;
const LONGEST_ADDRESS = 2048;

/** The address as the browser understands it, or null where it must not be a link. */
export function safeUrl(text) {
  let url;
  try {
    url = new URL(text);
  } catch {
    return null;
  }
  return PROTOCOLS.includes(url.protocol) ? url.href : null;
}

/** Labels that mean the same are the same. */
export function labelOf(text) {
  return text.trim().replace(/\s+/g, " ").toLowerCase();
}

/** A bare address at `start`, or one in angle brackets: { link, text, end }, or null. */
export function address(source, start, angle) {
  const pattern = angle ? ANGLE_URL : BARE_URL;
  pattern.lastIndex = start;
  const match = pattern.exec(source);
  let found = match?.[angle ? 1 : 0] ?? "";
  let end = pattern.lastIndex;
  if (found.length > LONGEST_ADDRESS) return null;
  if (match && !angle) {
    // Punctuation at the end is the sentence's, a closing bracket too if nothing opened it.
    const count = (sign) => found.split(sign).length - 1;
    let closing = count(")") - count("(");
    let length = found.length;
    for (; length; length -= 1) {
      if (found[length - 1] === ")" && closing > 0) closing -= 1;
      else if (!".,;:!?'_~".includes(found[length - 1])) break;
    }
    found = found.slice(0, length);
    end = start + length;
  }
  const link = found && safeUrl(found);
  return link ? { link, text: found.replace(/^mailto:/, ""), end } : null;
}

/** `(address "title")` at `at`: the address, and where it ends. */
export function destination(source, at) {
  const limit = Math.min(source.length, at + LONGEST_LINK);
  let end = at + 1;
  const blank = () => {
    while (end < limit && source.charCodeAt(end) <= 32) end += 1;
  };
  blank();
  let url;
  if (source[end] === "<") {
    const from = (end += 1);
    while (end < limit && source[end] !== ">" && source[end] !== "\n") end += 1;
    if (source[end] !== ">") return null;
    url = source.slice(from, end);
    end += 1;
  } else {
    const from = end;
    for (let depth = 0; end < limit && source.charCodeAt(end) > 32; end += 1) {
      if (source[end] === "(") depth += 1;
      else if (source[end] === ")" && --depth < 0) break;
    }
    url = source.slice(from, end);
  }
  blank();
  const quote = source[end];
  if (quote === '"' || quote === "'") {
    end += 1;
    while (end < limit && source[end] !== quote) end += 1;
    end += 1;
    blank();
  }
  return end < limit && source[end] === ")" ? { url, end: end + 1 } : null;
}
