"""awkward_python.py's asyncio, in a module of its own because Python 2 cannot read it."""

import asyncio

LOOPBACK = "127.0.0.1"
PATIENCE = 20


def letters(port, carrier):
    async def serve(reader, writer):
        writer.write(carrier(writer.get_extra_info("socket").fileno()).encode())
        await writer.drain()
        writer.close()

    async def one(number):
        reader, writer = await asyncio.open_connection(LOOPBACK, number)
        letter = (await asyncio.wait_for(reader.read(1), PATIENCE)).decode()
        writer.close()
        return letter

    async def all_of_it():
        server = await asyncio.start_server(serve, LOOPBACK, 0)
        own = server.sockets[0].getsockname()[1]
        found = await asyncio.gather(*(one(number) for number in (port, own, own, own)))
        server.close()
        await server.wait_closed()
        return "".join(found)

    return asyncio.run(all_of_it())
