"""Does what request.json in the folder of sent files asks for."""

import json
import sys
from pathlib import Path
from typing import Any

from hookmap.services.deploy.on_host.commands import Failed
from hookmap.services.deploy.on_host.deployment import deploy
from hookmap.services.deploy.on_host.folder import Folder
from hookmap.services.deploy.on_host.process import status, stop
from hookmap.services.deploy.on_host.request import FILE, read_request


def do(sent: Path) -> dict[str, Any]:
    """Run the action. `sent`: a folder inside the server's. Raises Failed, OSError."""
    request, folder = read_request(sent / FILE), Folder(sent.parent)
    if request.action != "deploy" and not folder.state:
        raise Failed(
            f"nothing was deployed to {folder.path}. Deploy: {request.again}, or name the folder: --folder DIR"
        )
    if request.action == "status":
        return status(folder)
    if request.action == "key":
        return {"key": folder.key()}
    with folder.locked():
        if request.action == "deploy":
            return deploy(folder, sent, request)
        return {"stopped": stop(folder, request), **status(folder)}


def main() -> None:
    """Print the result or the error as one JSON object; exit code 1 is an error."""
    try:
        result = do(Path(sys.argv[1]).resolve())
    except (Failed, OSError) as error:
        result = {"error": str(error)}
    sys.stdout.write(json.dumps(result) + "\n")
    sys.exit("error" in result)


if __name__ == "__main__":
    main()
