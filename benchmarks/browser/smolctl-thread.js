import { runThread } from "/code/engine.js";

onmessage = ({ data: { memory, module, index } }) => runThread(memory, module, index);
