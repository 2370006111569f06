// Numbers, sizes and times as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

export function number(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) >= 100 || Number.isInteger(value) ? whole.format(value) : tenth.format(value);
}

export function percent(value) {
  return value === null || value === undefined ? "–" : `${tenth.format(100 * value)} %`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return `${whole.format(1000 * value)} ms`;
  if (value < 100) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return span(value);
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < units.length - 1) { value /= 1024; at += 1; }
  return `${at && value < 100 ? tenth.format(value) : whole.format(value)} ${units[at]}`;
}

// A time span in its two largest units.
export function span(value) {
  const left = Math.max(0, Math.round(value));
  if (left < 60) return `${left} s`;
  if (left < 3600) return `${Math.floor(left / 60)} min`;
  if (left < 86400) return `${Math.floor(left / 3600)} h ${Math.floor((left % 3600) / 60)} min`;
  return `${Math.floor(left / 86400)} d ${Math.floor((left % 86400) / 3600)} h`;
}

export function ago(stamp) {
  if (!stamp) return "–";
  const past = (Date.now() - Date.parse(stamp)) / 1000;
  return past < 2 ? "now" : `${span(past)} ago`;
}

export function clock(stamp) {
  const at = new Date(stamp);
  const old = Date.now() - at > 20 * 3600 * 1000;
  return old ? at.toLocaleString("en-GB", { day: "2-digit", month: "short", hour: "2-digit", minute: "2-digit" }).replace(",", "") : at.toLocaleTimeString("en-GB");
}

export function count(value, word) {
  return `${number(value)} ${word}${value === 1 ? "" : "s"}`;
}
