// The engine of the page, in a worker as in the page.

export async function open(options) {
  const worker = new Worker("smolctl-worker.js", { type: "module" });
  const ask = (question) =>
    new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => (data.error ? reject(new Error(data.error)) : resolve(data));
      worker.onerror = (event) => reject(new Error(event.message));
      worker.postMessage(question);
    });
  await ask({ options });
  return (text, count) => ask({ text, count });
}
