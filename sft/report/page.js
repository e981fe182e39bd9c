const data = JSON.parse(document.getElementById("data").textContent);
const plots = [...document.querySelectorAll(".plot.steps")];
const number = (value) => {
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  const text = size > 0 && size < 1e-3 ? value.toExponential(3) : Number(value.toPrecision(5)).toString();
  return text.replaceAll("-", "−");
};
const whole = (value) => value.toLocaleString("en");

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
}

function write(target, at, lines) {
  target.replaceChildren();
  const word = (text, strong) => {
    const node = document.createElement(strong ? "b" : "span");
    node.textContent = text;
    target.append(node);
  };
  word("step ");
  word(whole(at), true);
  for (const line of lines) {
    const place = nearest(line.steps, at), step = line.steps[place];
    word(`  ·  ${line.name} `);
    word(number(line.values[place]), true);
    if (step !== at) word(` (step ${whole(step)})`);
  }
  const reach = (data.high - data.low) / 150;
  const near = data.events.filter(([step]) => Math.abs(step - at) <= reach).slice(0, 2);
  for (const [step, text] of near) word(`  ·  ${text} (step ${whole(step)})`);
  return target.textContent;
}

function show(chosen, step) {
  for (const plot of plots) {
    const lines = data.charts[plot.dataset.chart], cross = plot.querySelector(".cross");
    const at = lines[0].steps[nearest(lines[0].steps, step)];
    cross.hidden = false;
    cross.style.left = `${100 * (step - data.low) / (data.high - data.low)}%`;
    const text = write(plot.parentElement.querySelector(".read"), at, lines);
    if (plot === chosen) {
      plot.setAttribute("aria-valuenow", at);
      plot.setAttribute("aria-valuetext", text);
    }
  }
}

function stepUnder(plot, event) {
  const { left, width } = plot.getBoundingClientRect();
  const part = Math.min(Math.max((event.clientX - left) / width, 0), 1);
  const { steps } = data.charts[plot.dataset.chart][0];
  return steps[nearest(steps, data.low + part * (data.high - data.low))];
}

function move(plot, event) {
  const { steps } = data.charts[plot.dataset.chart][0], last = steps.length - 1;
  const here = nearest(steps, Number(plot.getAttribute("aria-valuenow")));
  const far = Math.max(1, Math.round(last / 20));
  const places = { ArrowLeft: here - 1, ArrowRight: here + 1, PageUp: here + far, PageDown: here - far, Home: 0, End: last };
  if (!(event.key in places)) return;
  event.preventDefault();
  show(plot, steps[Math.min(Math.max(places[event.key], 0), last)]);
}

for (const plot of plots) {
  const { steps } = data.charts[plot.dataset.chart][0];
  const cross = document.createElement("i");
  cross.className = "cross";
  cross.hidden = true;
  plot.append(cross);
  plot.classList.add("live");
  plot.tabIndex = 0;
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-valuemin", steps[0]);
  plot.setAttribute("aria-valuemax", steps[steps.length - 1]);
  plot.addEventListener("pointermove", (event) => show(plot, stepUnder(plot, event)));
  plot.addEventListener("pointerdown", (event) => show(plot, stepUnder(plot, event)));
  plot.addEventListener("keydown", (event) => move(plot, event));
}
for (const read of document.querySelectorAll(".read, .hint")) read.hidden = false;
if (plots.length) {
  show(null, data.high);
  for (const plot of plots) {
    const { steps } = data.charts[plot.dataset.chart][0];
    plot.querySelector(".cross").hidden = true;
    plot.setAttribute("aria-valuenow", steps[steps.length - 1]);
  }
}
