// The only file with a script of the static page: moves between the recorded frames, and opens the answer.
for (const panel of document.querySelectorAll(".rn-panel")) {
  const frames = [...panel.querySelectorAll(".rn-frame")];
  for (const dial of panel.querySelectorAll(".rn-dial")) {
    dial.addEventListener("input", () => {
      frames.forEach((frame, place) => { frame.hidden = place !== Number(dial.value); });
      if (dial.type === "range") dial.setAttribute("aria-valuetext", frames[dial.value].dataset.shown);
    });
  }
  for (const guess of panel.querySelectorAll(".rn-guess")) {
    guess.addEventListener("change", () => {
      for (const verdict of panel.querySelectorAll(".rn-verdict")) verdict.hidden = verdict.dataset.when !== guess.value;
    });
  }
}
