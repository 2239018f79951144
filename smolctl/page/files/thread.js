/** A helper thread of the engine, in its own worker. */

import { runThread } from "./engine.js";

onmessage = ({ data }) => runThread(data.memory, data.module, data.index);
postMessage("started");
