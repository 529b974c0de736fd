// What does a bad network do? A TCP proxy in front of the server, whose connections can be cut, refused or stalled.
import net from "node:net";

/** Ids of the events that came through are in `ids`, by connection. */
export async function proxy(target) {
  const { hostname, port } = new URL(target);
  const pairs = new Set(), streams = [];
  let refusing = false;
  const listener = net.createServer((client) => {
    if (refusing) return void client.destroy();
    const upstream = net.connect({ host: hostname, port: Number(port) });
    const pair = { client, upstream, ids: [], stream: false, after: null, stalled: false };
    pairs.add(pair);
    const close = () => {
      pairs.delete(pair);
      client.destroy();
      upstream.destroy();
    };
    client.on("data", (bytes) => {
      const asked = bytes.toString("latin1").match(/GET \/admin\/api\/stream\?(\S*)/);
      if (asked) {
        Object.assign(pair, { stream: true, after: new URLSearchParams(asked[1]).get("after"), at: Date.now() });
        streams.push(pair);
      }
      upstream.write(bytes);
    });
    upstream.on("data", (bytes) => {
      if (pair.stream) for (const [, id] of bytes.toString("latin1").matchAll(/^id: ?(\d+)/gm)) pair.ids.push(Number(id));
      if (!client.destroyed) client.write(bytes);
    });
    for (const socket of [client, upstream]) socket.on("close", close).on("error", close);
  });
  await new Promise((then) => listener.listen(0, "127.0.0.1", then));
  return {
    url: `http://127.0.0.1:${listener.address().port}`,
    streams,
    cut: () => pairs.forEach((pair) => pair.client.destroy()),
    refuse: (yes) => (refusing = yes),
    close: () => {
      pairs.forEach((pair) => pair.client.destroy());
      listener.close();
    },
  };
}
