"""An MCP server over stdio for the soak: one tool that works, one that kills the server, one that never answers."""

from __future__ import annotations

import os
import time

from mcp.server import MCPServer

server = MCPServer("soak")


@server.tool()
def double(number: int) -> int:
    """Doubles a number."""
    return 2 * number


@server.tool()
def die() -> str:
    """Ends the server in the middle of a call."""
    os._exit(9)


@server.tool()
def stall() -> str:
    """Says nothing for ten minutes."""
    time.sleep(600)
    return ""


if __name__ == "__main__":
    server.run()
