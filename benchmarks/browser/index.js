// What benchmarks/browser.py calls: it opens an engine by its name and has it continue texts.
// Every engine's module exports `open(options) -> continueText(text, count) -> {read, written}`, the numbers of
// tokens that it read and wrote. The text is read from its beginning, and each next token is the likeliest.

let continueText;

globalThis.openEngine = async (options) => {
  const { open } = await import(`./${options.engine}.js`);
  continueText = await open(options);
};
globalThis.continueText = (text, count) => continueText(text, count);
