/** A helper of the engine in a worker of its own. */

import { runThread } from "./engine.js";

onmessage = ({ data }) => runThread(data.memory, data.module, data.index);
postMessage("started");
