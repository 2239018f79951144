// In a search, a leading hyphen means "without this word". Without the hyphens, options such as --init-from are found.
document.addEventListener("input", ({ target }) => {
  if (target.matches(".md-search__input")) target.value = target.value.replace(/(^|\s)-+(?=\w)/g, "$1");
}, true);
