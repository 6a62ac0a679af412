// Fetches URL COUNT times, one after the other, by an agent that keeps its connection. The first answer is read when a
// line comes on stdin, so that a test can look at the connection. Prints its worker, and JSON: how many
// connections were made, and the SHA-256 of each body. The server must see each connection under its own address.
// usage: node node_client.js URL COUNT
'use strict';
const assert = require('assert');
const crypto = require('crypto');
const http = require('http');
const { once } = require('events');

const [url, count] = process.argv.slice(2);
const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
const sockets = new Set();

function get() {
  return new Promise((resolve, reject) => {
    http.get(url, { agent }, resolve).on('socket', (socket) => sockets.add(socket)).on('error', reject);
  });
}

async function main() {
  const hashes = [];
  for (let number = 0; number < Number(count); number++) {
    const response = await get();
    assert.strictEqual(response.statusCode, 200);
    const socket = response.socket;
    assert.strictEqual(response.headers['x-peer'], `${socket.localAddress}:${socket.localPort}`);
    if (number === 0) {
      console.log('connected', response.headers['x-worker']);
      await once(process.stdin, 'data');
    }
    const hash = crypto.createHash('sha256');
    for await (const piece of response) hash.update(piece);
    hashes.push(hash.digest('hex'));
  }
  agent.destroy();
  process.stdin.destroy();
  console.log(JSON.stringify({ connections: sockets.size, hashes }));
}

main();
