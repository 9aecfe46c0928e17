// Runs before the first paint, so that the page does not flash in the other colour scheme.
const chosenTheme = localStorage.getItem("theme");
if (chosenTheme) document.documentElement.dataset.theme = chosenTheme;
