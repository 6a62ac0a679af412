// An HTTP server. /pid tells which process answers; other paths are files of the directory SITE. Headers tell more:
// X-Peer the client's address as the server sees it, X-Worker the process.
// usage: node node_server.js PORT SITE [rr|none WORKERS]
'use strict';
const cluster = require('cluster');
const fs = require('fs');
const http = require('http');
const path = require('path');

const [port, site, scheduling, workers] = process.argv.slice(2);

function answer(request, response) {
  response.setHeader('X-Peer', `${request.socket.remoteAddress}:${request.socket.remotePort}`);
  response.setHeader('X-Worker', String(process.pid));
  if (request.url.startsWith('/pid')) {
    response.end(`${process.pid}\n`);
    return;
  }
  const file = fs.createReadStream(path.join(site, path.basename(request.url)));
  file.on('error', () => {
    response.statusCode = 404;
    response.end();
  });
  file.pipe(response);
}

if (workers && cluster.isPrimary) {
  cluster.schedulingPolicy = scheduling === 'none' ? cluster.SCHED_NONE : cluster.SCHED_RR;
  for (let count = 0; count < Number(workers); count++) cluster.fork();
  cluster.on('exit', () => cluster.fork());
  process.on('SIGTERM', () => {
    for (const worker of Object.values(cluster.workers)) worker.process.kill('SIGKILL');
    process.exit(0);
  });
} else {
  const server = http.createServer(answer);
  server.keepAliveTimeout = 60000;
  server.listen(Number(port), '127.0.0.1');
}
