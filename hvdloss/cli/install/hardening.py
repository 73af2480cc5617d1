"""Edits of Horovod's source that keep strangers out of a job (docs/security.md says of what, and how far).

As released, Horovod's rendezvous server listens on all interfaces and obeys whoever connects: a stranger
can change ranks' addresses, remove their entries, and in an elastic job have the launcher unpickle bytes of
his choice. Ranks' environments, and the key of the driver and task services, stand on command lines.

With these edits a job has a *token*: 32 random bytes of the launcher's, in hexadecimal, in the environment
of its ranks. Whoever asks the rendezvous server, or connects to a rank's Gloo port, says it first. It
travels to ranks over the standard input of their shells. Where no launcher made a token (Ray, Spark, ranks
started by hand) everything works as it did.
"""

from __future__ import annotations

from hvdloss.cli.install.edit import Edit

#: The variable with a job's token in the environment of its ranks.
TOKEN_ENV = "HOROVOD_GLOO_RENDEZVOUS_TOKEN"

_RUNNER = "horovod/runner/"
_TCP = "third_party/gloo/gloo/transport/tcp/"


_TOKEN = (
    # The token: made from the key that every launch has.
    Edit(
        _RUNNER + "common/util/secret.py",
        "def check_digest(key, message, digest):",
        f"""# What a rank says to the rendezvous server, and to other ranks, before anything else.
TOKEN_ENV = '{TOKEN_ENV}'


def token_of(key):
    return compute_digest(key, b'rendezvous token').hex()


def check_digest(key, message, digest):""",
        "a job has a token that its ranks know and strangers do not",
    ),
    Edit(
        _RUNNER + "launch.py",
        "    config_parser.set_env_from_args(env, args)\n    executable =",
        "    config_parser.set_env_from_args(env, args)\n"
        "    env[secret.TOKEN_ENV] = secret.token_of(settings.key)\n    executable =",
        "elastic ranks get the job's token",
    ),
    Edit(
        _RUNNER + "launch.py",
        "    config_parser.set_env_from_args(env, args)\n\n    def gloo_run_fn():",
        "    config_parser.set_env_from_args(env, args)\n"
        "    env[secret.TOKEN_ENV] = secret.token_of(settings.key)\n\n    def gloo_run_fn():",
        "ranks get the job's token",
    ),
    Edit(
        _RUNNER + "launch.py",
        """\
        run_func_server = KVStoreServer(verbose=settings.verbose)
        run_func_server_port = run_func_server.start_server()
        put_data_into_kvstore(driver_ip, run_func_server_port,
                              'runfunc', 'func', args.run_func)
""",
        """\
        token = secret.token_of(settings.key)
        run_func_server = KVStoreServer(verbose=settings.verbose, token=token, address=driver_ip)
        run_func_server_port = run_func_server.start_server()
        put_data_into_kvstore(driver_ip, run_func_server_port,
                              'runfunc', 'func', args.run_func, token=token)
""",
        "what is unpickled from this server was put there by the job",
    ),
    Edit(
        _RUNNER + "launch.py",
        "                                                    'runfunc_result', str(i))",
        "                                                    'runfunc_result', str(i), token=token)",
        "results are read with the token",
    ),
    Edit(
        _RUNNER + "gloo_run.py",
        "    rendezvous = RendezvousServer(settings.verbose)\n\n    # allocate",
        "    rendezvous = RendezvousServer(settings.verbose, token=env.get(secret.TOKEN_ENV),\n"
        "                                  address=server_ip)\n\n    # allocate",
        "the rendezvous server listens where ranks are told to find it, and knows the token",
    ),
    Edit(
        _RUNNER + "gloo_run.py",
        "    rendezvous = RendezvousServer(settings.verbose)\n    return launch_gloo_elastic",
        "    rendezvous = RendezvousServer(settings.verbose, token=env.get(secret.TOKEN_ENV))\n"
        "    return launch_gloo_elastic",
        "the elastic rendezvous server knows the token",
    ),
    Edit(
        _RUNNER + "gloo_run.py",
        """\
    handler = create_rendezvous_handler(driver)
    global_rendezv_port = rendezvous.start(handler)
    driver.wait_for_available_slots(settings.num_proc)

    nics = get_common_interfaces(driver)
    server_ip = network.get_driver_ip(nics)
""",
        """\
    driver.wait_for_available_slots(settings.num_proc)

    nics = get_common_interfaces(driver)
    server_ip = network.get_driver_ip(nics)
    handler = create_rendezvous_handler(driver)
    rendezvous.address = server_ip
    global_rendezv_port = rendezvous.start(handler)
""",
        "the elastic rendezvous server listens where ranks are told to find it",
    ),
    Edit(
        _RUNNER + "gloo_run.py",
        """\
        run_func_server = KVStoreServer(verbose=settings.verbose)
        run_func_server_port = run_func_server.start_server()
        put_data_into_kvstore(server_ip, run_func_server_port, 'runfunc', 'func', command_or_func)
""",
        """\
        token = env.get(secret.TOKEN_ENV)
        run_func_server = KVStoreServer(verbose=settings.verbose, token=token, address=server_ip)
        run_func_server_port = run_func_server.start_server()
        put_data_into_kvstore(server_ip, run_func_server_port, 'runfunc', 'func', command_or_func,
                              token=token)
""",
        "what is unpickled from this server was put there by the job",
    ),
    Edit(
        _RUNNER + "gloo_run.py",
        "read_data_from_kvstore(server_ip, run_func_server_port, 'runfunc_result', str(i))",
        "read_data_from_kvstore(server_ip, run_func_server_port, 'runfunc_result', str(i), token=token)",
        "results are read with the token",
    ),
    Edit(
        _RUNNER + "http/http_client.py",
        "from urllib.error import HTTPError, URLError\n",
        "import os\n\nfrom urllib.error import HTTPError, URLError\n",
        "the token stands in the environment",
    ),
    Edit(
        _RUNNER + "http/http_client.py",
        """\
from horovod.runner.common.util import codec


def read_data_from_kvstore(addr, port, scope, key):
""",
        """\
from horovod.runner.common.util import codec, secret


def _headers(token):
    token = token or os.environ.get(secret.TOKEN_ENV)
    return {'Authorization': 'Bearer ' + token} if token else {}


def read_data_from_kvstore(addr, port, scope, key, token=None):
""",
        "requests say the token",
    ),
    Edit(
        _RUNNER + "http/http_client.py",
        "        req = Request(url)\n",
        "        req = Request(url, headers=_headers(token))\n",
        "requests say the token",
    ),
    Edit(
        _RUNNER + "http/http_client.py",
        "def put_data_into_kvstore(addr, port, scope, key, value):\n",
        "def put_data_into_kvstore(addr, port, scope, key, value, token=None):\n"
        "    data = codec.dumps_base64(value, to_ascii=False)\n"
        "    put_bytes_into_kvstore(addr, port, scope, key, data, token)\n\n\n"
        "def put_bytes_into_kvstore(addr, port, scope, key, data, token=None):\n",
        "bytes can be put as they are, not pickled",
    ),
    Edit(
        _RUNNER + "http/http_client.py",
        "        req = Request(url, data=codec.dumps_base64(value, to_ascii=False))\n",
        "        req = Request(url, data=data, headers=_headers(token))\n",
        "requests put bytes, with the token",
    ),
)

_SERVERS = (
    Edit(
        _RUNNER + "util/network.py",
        "def find_port(server_factory):\n",
        "def find_port(server_factory, address=''):\n",
        "servers can listen on one address",
    ),
    Edit(
        _RUNNER + "util/network.py",
        "            addr = ('', port)\n",
        "            addr = (address, port)\n",
        "servers can listen on one address",
    ),
    Edit(
        _RUNNER + "http/http_server.py",
        "import collections\nimport logging\n",
        "import collections\nimport hmac\nimport logging\n",
        "tokens are compared in constant time",
    ),
    Edit(
        _RUNNER + "http/http_server.py",
        "from http.server import HTTPServer, SimpleHTTPRequestHandler\n",
        "from http.server import BaseHTTPRequestHandler, HTTPServer\n",
        "the server of keys serves no files of the working directory",
    ),
    Edit(
        _RUNNER + "http/http_server.py",
        """\
class KVStoreHandler(SimpleHTTPRequestHandler):
    # Set timeout
    timeout = SINGLE_REQUEST_TIMEOUT
""",
        """\
class KVStoreHandler(BaseHTTPRequestHandler):
    # Set timeout
    timeout = SINGLE_REQUEST_TIMEOUT

    # Nothing of a request is looked at before its token.
    def parse_request(self):
        if not super().parse_request():
            return False
        token = self.server.token
        said = self.headers.get('Authorization', '').encode('latin-1', 'replace')
        if token and not hmac.compare_digest(said, b'Bearer ' + token.encode()):
            logging.warning('KVStore: refused a request without the token of this job, from %s',
                            self.client_address[0])
            self.close_connection = True
            self.send_status_code(FORBIDDEN)
            return False
        return True
""",
        "requests of strangers are refused before anything of them is read",
    ),
    Edit(
        _RUNNER + "http/http_server.py",
        "BAD_REQUEST = 400\n",
        "BAD_REQUEST = 400\nFORBIDDEN = 403\n",
        "the answer to strangers",
    ),
    Edit(
        _RUNNER + "http/http_server.py",
        """\
class RendezvousHTTPServer(socketserver.ThreadingMixIn, HTTPServer, object):
    def __init__(self, addr, handler, verbose):
        # This class has to inherit from object since HTTPServer is an old-style
        # class that does not inherit from object.
        super(RendezvousHTTPServer, self).__init__(addr, handler)
""",
        """\
class _JobServer(socketserver.ThreadingMixIn, HTTPServer):
    # A connection that says nothing holds up neither other requests nor the end of the job.
    daemon_threads = True

    def handle_error(self, request, client_address):
        logging.warning('KVStore: a request from %s was broken off', client_address[0], exc_info=True)


class RendezvousHTTPServer(_JobServer):
    def __init__(self, addr, handler, verbose, token=None):
        super(RendezvousHTTPServer, self).__init__(addr, handler)
        self.token = token
""",
        "a silent connection does not keep horovodrun from ending",
    ),
    Edit(
        _RUNNER + "http/http_server.py",
        """\
class RendezvousServer:
    def __init__(self, verbose=0):
        self._httpd = None
""",
        """\
class RendezvousServer:
    def __init__(self, verbose=0, token=None, address=''):
        self.token = token
        self.address = address
        self._httpd = None
""",
        "the rendezvous server has a token, and an address to listen on",
    ),
    Edit(
        _RUNNER + "http/http_server.py",
        "                addr, handler_cls, self._verbose))\n",
        "                addr, handler_cls, self._verbose, self.token), self.address)\n",
        "the rendezvous server has a token, and an address to listen on",
    ),
    Edit(
        _RUNNER + "http/http_server.py",
        "    def stop(self):\n        self._httpd.shutdown()\n",
        "    def stop(self):\n        if self._httpd is None:\n            return\n"
        "        self._httpd.shutdown()\n",
        "an elastic job may end before its server started",
    ),
    Edit(
        _RUNNER + "http/http_server.py",
        """\
class KVStoreHTTPServer(HTTPServer, object):
    def __init__(self, addr, handler, verbose):
        super(KVStoreHTTPServer, self).__init__(addr, handler)
""",
        """\
class KVStoreHTTPServer(_JobServer):
    def __init__(self, addr, handler, verbose, token=None):
        super(KVStoreHTTPServer, self).__init__(addr, handler)
        self.token = token
""",
        "a silent connection holds up no other request",
    ),
    Edit(
        _RUNNER + "http/http_server.py",
        """\
class KVStoreServer:
    def __init__(self, verbose):
""",
        """\
class KVStoreServer:
    def __init__(self, verbose, token=None, address=''):
        self.token = token
        self.address = address
""",
        "the server of functions has a token, and an address to listen on",
    ),
    Edit(
        _RUNNER + "http/http_server.py",
        "                addr, KVStoreHandler, self.verbose))\n",
        "                addr, KVStoreHandler, self.verbose, self.token), self.address)\n",
        "the server of functions has a token, and an address to listen on",
    ),
    # Driver, task and notification services: HMAC keeps strangers out, but read first what they send.
    Edit(
        _RUNNER + "common/util/network.py",
        "import pickle\nimport psutil\n",
        "import os\nimport pickle\nimport psutil\n",
        "the limit of a message stands in the environment",
    ),
    Edit(
        _RUNNER + "common/util/network.py",
        "class PingRequest(object):\n",
        """\
# Before its digest is checked, a message is a stranger's: how much of it is read, and how long it may take.
MAX_MESSAGE_BYTES = int(os.environ.get('HOROVOD_SERVICE_MAX_BYTES', 256 * 2**20))
READ_SECONDS = 30


def _listen_address(nics):
    chosen = [a.address for nic, addresses in psutil.net_if_addrs().items() if nics and nic in nics
              for a in addresses if a.family == socket.AF_INET]
    return chosen[0] if len(chosen) == 1 else ''


class PingRequest(object):
""",
        "services listen on the chosen interface and read no more than a limit",
    ),
    Edit(
        _RUNNER + "common/util/network.py",
        """\
        # Unpack message length into 4-byte integer.
        message_len = struct.unpack('i', rfile.read(4))[0]
        message = rfile.read(message_len)
""",
        """\
        # Unpack message length into 4-byte integer.
        length = rfile.read(4)
        if len(length) < 4:
            raise EOFError('The connection was closed before a message.')
        message_len = struct.unpack('i', length)[0]
        if not 0 <= message_len <= MAX_MESSAGE_BYTES:
            raise Exception('Security error: a message of {} bytes; the limit is {} '
                            '(HOROVOD_SERVICE_MAX_BYTES).'.format(message_len, MAX_MESSAGE_BYTES))
        message = rfile.read(message_len)
""",
        "services read no more than a limit",
    ),
    Edit(
        _RUNNER + "common/util/network.py",
        "                addr, self._make_handler()))\n",
        "                addr, self._make_handler()), _listen_address(nics))\n",
        "services listen on the chosen interface",
    ),
    Edit(
        _RUNNER + "common/util/network.py",
        "                    req = server._wire.read(self.rfile)\n",
        "                    self.connection.settimeout(READ_SECONDS)\n"
        "                    req = server._wire.read(self.rfile)\n"
        "                    self.connection.settimeout(None)\n",
        "a silent connection does not keep a service from ending",
    ),
    Edit(
        _RUNNER + "common/util/network.py",
        "                except (EOFError, BrokenPipeError):\n",
        "                except (EOFError, ConnectionError, socket.timeout):\n",
        "connections that break are no errors of the service",
    ),
    # What an elastic worker tells the launcher is JSON, not a pickle.
    Edit(
        _RUNNER + "elastic/rendezvous.py",
        "import logging\n\nfrom horovod.runner.common.util import codec\n",
        "import json\nimport logging\n\n",
        "the launcher unpickles nothing that a worker sent",
    ),
    Edit(
        _RUNNER + "elastic/rendezvous.py",
        "                addresses, secret_key = codec.loads_base64(value)\n",
        """\
                told = json.loads(value)
                addresses = {str(nic): [(str(ip), int(port)) for ip, port in pairs]
                             for nic, pairs in told['addresses'].items()}
                secret_key = bytes.fromhex(told['key'])
""",
        "the launcher unpickles nothing that a worker sent",
    ),
    Edit(
        _RUNNER + "elastic/worker.py",
        "import os\nimport threading\n",
        "import json\nimport os\nimport threading\n",
        "what a worker tells the launcher is JSON",
    ),
    Edit(
        _RUNNER + "elastic/worker.py",
        "import put_data_into_kvstore\n",
        "import put_bytes_into_kvstore\n",
        "what a worker tells the launcher is JSON",
    ),
    Edit(
        _RUNNER + "elastic/worker.py",
        "            self._service = WorkerNotificationService(secret_key, nic, self)\n\n"
        "            value = (self._service.addresses(), secret_key)\n"
        "            put_data_into_kvstore(rendezvous_addr,\n"
        "                                  rendezvous_port,\n"
        "                                  PUT_WORKER_ADDRESSES,\n"
        "                                  self._create_id(hostname, local_rank),\n"
        "                                  value)\n",
        "            # A list of names: in a bare string, 'eth1' would also mean the interface 'eth'.\n"
        "            self._service = WorkerNotificationService(secret_key, [nic] if nic else None, self)\n\n"
        "            value = {'addresses': self._service.addresses(), 'key': secret_key.hex()}\n"
        "            put_bytes_into_kvstore(rendezvous_addr,\n"
        "                                   rendezvous_port,\n"
        "                                   PUT_WORKER_ADDRESSES,\n"
        "                                   self._create_id(hostname, local_rank),\n"
        "                                   json.dumps(value).encode())\n",
        "what a worker tells the launcher is JSON",
    ),
)

_COMMAND_LINES = (
    Edit(
        _RUNNER + "common/util/safe_shell_exec.py",
        "def _exec_middleman(command, env, exit_event, stdout, stderr, rw):\n",
        "def _exec_middleman(command, env, exit_event, stdout, stderr, rw, stdin=None):\n",
        "commands can be given text on their standard input",
    ),
    Edit(
        _RUNNER + "common/util/safe_shell_exec.py",
        """\
    executor_shell = subprocess.Popen(command, shell=True, env=env,
                                      stdout=stdout_w, stderr=stderr_w)
""",
        """\
    executor_shell = subprocess.Popen(command, shell=True, env=env,
                                      stdin=None if stdin is None else subprocess.PIPE,
                                      stdout=stdout_w, stderr=stderr_w)

    def feed():
        try:
            with executor_shell.stdin as pipe:
                pipe.write(stdin.encode('utf-8', 'surrogateescape'))
        except BrokenPipeError:
            pass  # the command ended early, and its exit code says why

    if stdin is not None:
        in_thread(feed)
""",
        "commands can be given text on their standard input",
    ),
    Edit(
        _RUNNER + "common/util/safe_shell_exec.py",
        "            prefix_output_with_timestamp=False):\n",
        "            prefix_output_with_timestamp=False, stdin=None):\n",
        "commands can be given text on their standard input",
    ),
    Edit(
        _RUNNER + "common/util/safe_shell_exec.py",
        "                                                          (r, w)))\n",
        "                                                          (r, w), stdin))\n",
        "commands can be given text on their standard input",
    ),
    Edit(
        _RUNNER + "gloo_run.py",
        "import math\nimport os\nimport signal\n",
        "import math\nimport os\nimport shlex\nimport signal\n",
        "environments travel over the standard input of shells",
    ),
    Edit(
        _RUNNER + "gloo_run.py",
        "from horovod.runner.common.util import env as env_util, safe_shell_exec\n",
        "from horovod.runner.common.util import env as env_util, safe_shell_exec, secret\n",
        "the launcher knows the token",
    ),
    Edit(
        _RUNNER + "gloo_run.py",
        """\
        return '{shell} {horovod_env} {env} {run_command}' .format(
            shell='env',
            horovod_env=horovod_rendez_env,
            env=' '.join(['%s=%s' % (key, quote(value)) for key, value in env.items()
                          if env_util.is_exportable(key)]),
""",
        """\
        # Assignments, which the shell keeps to itself, where `env` would have them on its command line.
        exported = {key: quote(value) for key, value in env.items() if env_util.is_exportable(key)}
        odd = ['%s=%s' % (key, value) for key, value in exported.items()
               if not (key.isidentifier() and key.isascii())]
        return '{horovod_env} {env} {odd} {run_command}' .format(
            horovod_env=horovod_rendez_env,
            env=' '.join(['%s=%s' % (key, value) for key, value in exported.items()
                          if key.isidentifier() and key.isascii()]),
            odd=' '.join(['env'] + odd) if odd else '',
""",
        "the environment of ranks stands on no command line",
    ),
    Edit(
        _RUNNER + "gloo_run.py",
        """\
        if host_address not in local_addresses:
            local_command = quote('cd {pwd} > /dev/null 2>&1 ; {command}'
                                  .format(pwd=os.getcwd(), command=command))
            command = get_remote_command(local_command,
                                         host=host_name,
                                         port=settings.ssh_port,
                                         identity_file=settings.ssh_identity_file)

        if settings.verbose:
            print(command)
""",
        """\
        # The command and its environment, where secrets are, go to the shell over its standard input: a
        # command line is there for everybody to read, on both hosts.
        shown = shlex.split(command)
        while shown and (shown[0] == 'env' or '=' in shown[0]):
            shown.pop(0)
        script = '%s < /dev/null\\n' % command
        command = 'exec /bin/sh'
        if host_address not in local_addresses:
            script = 'cd %s > /dev/null 2>&1\\n%s' % (quote(os.getcwd()), script)
            if env_util.is_kubeflow_mpi():  # which connects no standard input
                command, script = quote(script), None
            command = get_remote_command(command,
                                         host=host_name,
                                         port=settings.ssh_port,
                                         identity_file=settings.ssh_identity_file)

        if settings.verbose:
            print('rank {} on {}: {}'.format(index, host_name, ' '.join(shown)))
""",
        "the environment of ranks stands on no command line and in no log",
    ),
    Edit(
        _RUNNER + "gloo_run.py",
        "                                                events=all_events,\n",
        "                                                events=all_events,\n"
        "                                                stdin=script,\n",
        "environments travel over the standard input of shells",
    ),
    Edit(
        _RUNNER + "driver/driver_service.py",
        "from horovod.runner.common.util import codec, safe_shell_exec\n",
        "from horovod.runner.common.util import codec, env as env_util, safe_shell_exec\n",
        "the key of the services stands on no command line",
    ),
    Edit(
        _RUNNER + "driver/driver_service.py",
        """\
    def _exec_command(command):
        host_output = io.StringIO()
        try:
            exit_code = safe_shell_exec.execute(command,
""",
        """\
    # With the key of the services: over the standard input, since command lines are for all to read.
    # (Kubeflow's way to other hosts connects no standard input.)
    told = codec.dumps_base64(settings)

    def _exec_command(command):
        host_output = io.StringIO()
        try:
            exit_code = safe_shell_exec.execute(command,
                                                stdin=told,
""",
        "the key of the services stands on no command line",
    ),
    Edit(
        _RUNNER + "driver/driver_service.py",
        "                    settings=codec.dumps_base64(settings))\n",
        "                    settings=told if env_util.is_kubeflow_mpi() else '-')\n",
        "the key of the services stands on no command line",
    ),
    Edit(
        _RUNNER + "task_fn.py",
        "    settings = codec.loads_base64(sys.argv[4])\n",
        "    settings = codec.loads_base64(sys.stdin.read() if sys.argv[4] == '-' else sys.argv[4])\n",
        "the key of the services stands on no command line",
    ),
    Edit(
        _RUNNER + "util/remote.py",
        "from horovod.runner.common.util import env as env_util\n",
        "import os\nfrom shlex import quote\n\nfrom horovod.runner.common.util import env as env_util\n",
        "hosts' keys can be checked",
    ),
    Edit(
        _RUNNER + "util/remote.py",
        "SSH_COMMAND_PREFIX = 'ssh -o PasswordAuthentication=no -o StrictHostKeyChecking=no'\n",
        "SSH_COMMAND_PREFIX = 'ssh -o PasswordAuthentication=no -o StrictHostKeyChecking=' + \\\n"
        "    quote(os.environ.get('HOROVOD_SSH_HOST_KEY_CHECKING', 'no'))\n",
        "hosts' keys can be checked",
    ),
    Edit(
        _RUNNER + "util/cache.py",
        "            os.makedirs(cache_folder)\n",
        "            os.makedirs(cache_folder, mode=0o700)\n",
        "nobody else has business in a folder of pickles",
    ),
)

_GLOO = (
    Edit(
        "horovod/common/gloo/gloo_context.cc",
        "                                          const std::vector<int>& registered_ranks) {\n",
        "                                          const std::vector<int>& registered_ranks) {\n"
        "  gloo_iface_ = global_context.gloo_iface_;\n",
        "process sets listen on the chosen interface, not on that of the host's name",
    ),
    Edit(
        "horovod/common/gloo/http_store.cc",
        "      http::Response response = request.send(method, body);\n",
        f"""\
      std::vector<std::string> headers;
      if (const char* token = std::getenv("{TOKEN_ENV}")) {{
        headers.push_back(std::string("Authorization: Bearer ") + token);
      }}
      http::Response response = request.send(method, body, headers);
""",
        "ranks say the token to the rendezvous server",
    ),
    Edit(
        "horovod/common/gloo/http_store.cc",
        "#include <cstring>\n",
        "#include <cstdlib>\n#include <cstring>\n",
        "for std::getenv",
    ),
    # A rank's port takes whoever connects first for the peer. With a token, the peer says it first.
    Edit(
        _TCP + "pair.h",
        "  int fd_;\n",
        """\
  int fd_;

  // While a connection has not said the job's token yet (see handleListening):
  // the listening socket, and what was said so far.
  int listeningFd_{-1};
  std::string said_;
""",
        "only ranks of the job become peers",
    ),
    Edit(
        _TCP + "pair.h",
        "  void handleListening();\n",
        "  void handleListening();\n\n"
        "  // Reads the job's token from a new connection.\n  void handleToken();\n\n"
        "  // Ends a connection that has not said the token.\n  void dropStranger();\n",
        "only ranks of the job become peers",
    ),
    Edit(
        _TCP + "pair.cc",
        "constexpr size_t kMaxRecvBufferSize = 32 * 1024 * 1024;\n",
        f"""\
constexpr size_t kMaxRecvBufferSize = 32 * 1024 * 1024;

// What a peer says before anything else; empty where no launcher made one.
const std::string& jobToken() {{
  static const std::string token = [] {{
    const char* value = getenv("{TOKEN_ENV}");
    return std::string(value == nullptr ? "" : value);
  }}();
  return token;
}}

bool sameBytes(const std::string& a, const std::string& b) {{
  unsigned char different = a.size() != b.size();
  for (size_t i = 0; i < a.size() && i < b.size(); i++) {{
    different |= static_cast<unsigned char>(a[i] ^ b[i]);
  }}
  return different == 0;
}}
""",
        "only ranks of the job become peers",
    ),
    Edit(
        _TCP + "pair.cc",
        """\
  // self_ > peer_; we are connecting side.
  // First destroy listening socket.
""",
        """\
  // self_ > peer_; we are connecting side.
  // First destroy listening socket.
  dropStranger();
""",
        "a stranger at a port that is not used goes with it",
    ),
    Edit(
        _TCP + "pair.cc",
        """\
void Pair::handleListening() {
  struct sockaddr_storage addr;
  socklen_t addrlen = sizeof(addr);
  int rv;

  rv = accept(fd_, (struct sockaddr*)&addr, &addrlen);
""",
        """\
// Called with the lock held.
void Pair::dropStranger() {
  if (listeningFd_ == FD_INVALID) {
    return;
  }
  device_->unregisterDescriptor(fd_, this);
  ::close(fd_);
  fd_ = listeningFd_;
  listeningFd_ = FD_INVALID;
  said_.clear();
  device_->registerDescriptor(fd_, EPOLLIN, this);
}

void Pair::handleToken() {
  const auto& token = jobToken();
  std::array<char, 256> bytes;
  const auto wanted = std::min(bytes.size(), token.size() - said_.size());
  const auto rv = ::recv(fd_, bytes.data(), wanted, MSG_DONTWAIT);
  if (rv == -1 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
    return;
  }
  if (rv > 0) {
    said_.append(bytes.data(), rv);
    if (said_.size() < token.size()) {
      return;
    }
  }
  if (rv <= 0 || !sameBytes(said_, token)) {
    fprintf(stderr, "gloo: dropped a connection that did not say the token of this job\\n");
    dropStranger();
    return;
  }
  // A peer: from here on as without a token.
  device_->unregisterDescriptor(fd_, this);
  ::close(listeningFd_);
  listeningFd_ = FD_INVALID;
  said_.clear();
  handleConnected();
}

void Pair::handleListening() {
  struct sockaddr_storage addr;
  socklen_t addrlen = sizeof(addr);
  int rv;

  if (listeningFd_ != FD_INVALID) {
    handleToken();
    return;
  }

  rv = accept(fd_, (struct sockaddr*)&addr, &addrlen);

  if (!jobToken().empty()) {
    if (rv == -1) {
      return; // it was gone before we came to it
    }
    // Wait for what it says, on the loop like everything else.
    device_->unregisterDescriptor(fd_, this);
    listeningFd_ = fd_;
    fd_ = rv;
    device_->registerDescriptor(fd_, EPOLLIN, this);
    return;
  }
""",
        "only ranks of the job become peers",
    ),
    Edit(
        _TCP + "pair.cc",
        """\
        GLOO_ERROR_MSG("connect ", peer_.str(), ": ", strerror(optval)));
    return;
  }
""",
        """\
        GLOO_ERROR_MSG("connect ", peer_.str(), ": ", strerror(optval)));
    return;
  }

  // The first bytes of a connection; its buffer is empty and holds them all.
  const auto& token = jobToken();
  if (!token.empty() &&
      ::send(fd_, token.data(), token.size(), MSG_NOSIGNAL) !=
          static_cast<ssize_t>(token.size())) {
    signalException(GLOO_ERROR_MSG("send ", peer_.str(), ": ", strerror(errno)));
    return;
  }
""",
        "ranks say the token to each other",
    ),
    Edit(
        _TCP + "pair.cc",
        "        // The pair may be in the LISTENING state when it is destructed.\n",
        "        // The pair may be in the LISTENING state when it is destructed.\n        dropStranger();\n",
        "a stranger at a port that is closed goes with it",
    ),
)

HARDENING: tuple[Edit, ...] = (*_TOKEN, *_SERVERS, *_COMMAND_LINES, *_GLOO)
