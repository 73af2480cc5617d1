"""Edits of Horovod's source by which ranks get over the loss of another (docs/reliability.md).

As released, a rank that loses a peer can

- *stand still with Python's lock*: where process sets are dynamic (``HOROVOD_DYNAMIC_PROCESS_SETS``)
  every cycle of the background thread exchanges numbers with all ranks, and holds the table's lock while it
  waits for them. A rank that hands over a tensor meanwhile waits for that lock inside a C++ function that
  holds Python's: no thread of its process runs, no watch, no signal handler, until Gloo's time-out (30 s).
- *leave a tensor behind*: one that is handed over just as the background thread gives up is put into a
  queue that is finished already. Nobody ever answers for it, and in an elastic job, which begins again with
  the same queue, the next tensor of its name is refused as a duplicate.
- *end by std::terminate*: where there are further process sets, giving up agrees with all ranks on their
  removal, and who cannot be reached is an exception that nothing catches.

And a ``horovodrun`` that is told to end (SIGTERM) may exit with 0, as if the job were done: it waits for the
shells of its ranks in two threads, and the one that takes their exit statuses drops them. In an elastic job
it waits for ever for a rank that neither ends nor begins again with the others, as one that is stopped.
"""

from __future__ import annotations

from hvdloss.cli.install.edit import Edit

_QUEUE = "horovod/common/tensor_queue"
_SETS = "horovod/common/process_set.cc"
_REGISTRY = "horovod/runner/elastic/registration.py"

_NOT_WHEN_FINISHED = "  if (finished_) {\n    return SHUT_DOWN_ERROR;\n  }\n"

RECOVERY: tuple[Edit, ...] = (
    Edit(
        _QUEUE + ".h",
        "  void FinalizeTensorQueue(const Status& status);\n",
        "  void FinalizeTensorQueue(const Status& status);\n\n"
        "  // Take tensors again, after FinalizeTensorQueue().\n"
        "  void Reopen();\n",
        "a queue that is finished can begin again",
    ),
    Edit(
        _QUEUE + ".h",
        "  mutable std::mutex mutex_;\n",
        "  mutable std::mutex mutex_;\n\n  bool finished_ = false;\n",
        "a queue knows that it is finished",
    ),
    Edit(
        _QUEUE + ".cc",
        "Request& message) {\n  std::lock_guard<std::mutex> guard(mutex_);\n  if (tensor_table_",
        "Request& message) {\n  std::lock_guard<std::mutex> guard(mutex_);\n"
        f"{_NOT_WHEN_FINISHED}  if (tensor_table_",
        "a tensor that comes after the end is refused, not forgotten",
    ),
    Edit(
        _QUEUE + ".cc",
        "std::vector<Request>& messages) {\n  std::lock_guard<std::mutex> guard(mutex_);\n",
        "std::vector<Request>& messages) {\n  std::lock_guard<std::mutex> guard(mutex_);\n"
        f"{_NOT_WHEN_FINISHED}",
        "tensors that come after the end are refused, not forgotten",
    ),
    Edit(
        _QUEUE + ".cc",
        "void TensorQueue::FinalizeTensorQueue(const Status& status) {\n"
        "  std::lock_guard<std::mutex> guard(mutex_);\n",
        "void TensorQueue::Reopen() {\n"
        "  std::lock_guard<std::mutex> guard(mutex_);\n"
        "  finished_ = false;\n"
        "}\n\n"
        "void TensorQueue::FinalizeTensorQueue(const Status& status) {\n"
        "  std::lock_guard<std::mutex> guard(mutex_);\n"
        "  finished_ = true;\n",
        "a queue is finished from here on",
    ),
    Edit(
        _SETS,
        "  initialization_done = true;\n  return true;\n",
        "  tensor_queue.Reopen();\n  initialization_done = true;\n  return true;\n",
        "an elastic job begins again with the queue it has",
        count=2,  # over MPI, over Gloo
    ),
    Edit(
        _SETS,
        """\
  std::lock_guard<std::recursive_mutex> guard(mutex);

  auto locally_registered_count = (int)ids_.size();
  std::array<int, 2> pair_to_transmit{locally_registered_count,
                                      id_to_be_removed_};
""",
        """\
  std::unique_lock<std::recursive_mutex> guard(mutex);

  // What all ranks agree on is what they say here, whatever changes meanwhile.
  const auto ids = ids_;
  const auto to_be_removed = id_to_be_removed_;
  auto locally_registered_count = (int)ids.size();
  std::array<int, 2> pair_to_transmit{locally_registered_count, to_be_removed};
""",
        "what is agreed on does not change while ranks agree on it",
    ),
    Edit(
        _SETS,
        "  global_controller.Allgather2Ints(pair_to_transmit, recv_buffer);\n",
        "  // Whoever hands over a tensor takes this lock, and may hold Python's.\n"
        "  guard.unlock();\n"
        "  global_controller.Allgather2Ints(pair_to_transmit, recv_buffer);\n"
        "  guard.lock();\n",
        "no lock is held while other ranks are waited for",
    ),
    Edit(
        _SETS,
        "    if (other_marked_id != id_to_be_removed_) {\n",
        "    if (other_marked_id != to_be_removed) {\n",
        "what is agreed on is what was said",
    ),
    Edit(
        _SETS,
        "    for (auto id : Ids()) {\n      bool newly_registered",
        "    for (auto id : ids) {\n      bool newly_registered",
        "only what all have registered is begun",
    ),
    Edit(
        _SETS,
        """\
    if (id_to_be_removed_ == NO_PENDING_REMOVAL ||
        id_to_be_removed_ == SUCCESSFUL_REMOVAL) {
""",
        """\
    if (to_be_removed == NO_PENDING_REMOVAL ||
        to_be_removed == SUCCESSFUL_REMOVAL) {
""",
        "what is removed is what was said",
    ),
    Edit(
        _SETS,
        """\
  std::lock_guard<std::recursive_mutex> guard(mutex);
  std::vector<int32_t> ids_copy(ids_.begin(), ids_.end());
""",
        """\
  std::unique_lock<std::recursive_mutex> guard(mutex);
  std::vector<int32_t> ids_copy(ids_.begin(), ids_.end());
""",
        "no lock is held while ranks agree on the end",
    ),
    Edit(
        _SETS,
        """\
    while (true) {
      InitializeRegisteredAndRemoveMarkedIfReady_(context, status);
""",
        """\
    while (true) {
      guard.unlock();
      try {
        InitializeRegisteredAndRemoveMarkedIfReady_(context, status);
      } catch (const std::exception& ex) {
        // Another rank is gone: there is nobody to agree with.
        guard.lock();
        LOG(DEBUG) << "Process set " << id << " is removed alone: " << ex.what();
        id_to_process_set_[id].Finalize(status);
        DeregisterProcessSet(id);
        id_to_be_removed_ = SUCCESSFUL_REMOVAL;
        guard.unlock();
      }
      guard.lock();
""",
        "a rank that is gone does not end those that remove their process sets",
    ),
    Edit(
        "horovod/runner/common/util/safe_shell_exec.py",
        """\
    try:
        p.wait(timeout=GRACEFUL_TERMINATION_TIME_S)
    except psutil.TimeoutExpired:
        try:
            p.kill()
        except psutil.NoSuchProcess:
            pass
""",
        """\
    # Not p.wait(): it would take the exit status from who waits for the shell, and that one would read 0.
    until = time.time() + GRACEFUL_TERMINATION_TIME_S
    try:
        while p.is_running() and p.status() != psutil.STATUS_ZOMBIE:
            if time.time() > until:
                p.kill()
                break
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        pass
""",
        "horovodrun that is told to end does not say that the job is done",
    ),
    Edit(
        _REGISTRY,
        "                self._workers[state].add(key)\n\n            rendezvous_id",
        """\
                self._workers[state].add(key)
                if state == READY and self.count(READY) == 1:
                    self._expect_the_others()

            rendezvous_id""",
        "when one rank begins again, the others are expected to",
    ),
    Edit(
        _REGISTRY,
        "    def _wait(self, key, state, rendezvous_id):\n",
        """\
    def _expect_the_others(self):
        rendezvous_id = self._rendezvous_id

        def expect():
            # Second by second: time in which this process itself was stopped does not count.
            for _ in range(self._driver.timeout):
                time.sleep(1)
                if self._rendezvous_id != rendezvous_id or self._driver.finished():
                    return
            with self._lock:
                if self._rendezvous_id != rendezvous_id:
                    return
                missing = [slot_info
                           for slots in self._driver.host_assignments.values() for slot_info in slots
                           if (slot_info.hostname, slot_info.local_rank) not in self._states]
            for slot_info in missing:
                self._driver.give_up(slot_info, rendezvous_id)

        threading.Thread(target=expect, daemon=True).start()

    def record_missing(self, host, slot, rendezvous_id):
        key = (host, slot)
        with self._lock:
            if self._rendezvous_id != rendezvous_id or key in self._states:
                return None  # it has come after all
            logging.error('%s[%d] has neither ended nor begun again in %d seconds (--elastic-timeout), as '
                          'others have: its host is given up', host, slot, self._driver.timeout)
            self._states[key] = FAILURE
            self._workers[FAILURE].add(key)
        return self._wait(key, FAILURE, rendezvous_id)

    def _wait(self, key, state, rendezvous_id):
""",
        "a rank that neither ends nor begins again does not hold the others up for ever",
    ),
    Edit(
        _REGISTRY,
        "import logging\nimport threading\n",
        "import logging\nimport threading\nimport time\n",
        "seconds are waited for",
    ),
    Edit(
        "horovod/runner/elastic/driver.py",
        "    def finished(self):\n",
        """\
    @property
    def timeout(self):
        return self._timeout

    def give_up(self, slot_info, rendezvous_id):
        host, slot = slot_info.hostname, slot_info.local_rank

        def record():
            recorded = self._worker_registry.record_missing(host, slot, rendezvous_id)
            if self.finished() and recorded == self._worker_registry.last_rendezvous():
                # Nobody goes on without it: the job has failed.
                self._results.add_result('{}[{}]'.format(host, slot), (1, _epoch_time_s()))

        thread = threading.Thread(target=record, daemon=True)
        self._results.expect(thread)
        thread.start()

    def finished(self):
""",
        "a worker that is given up counts as one that has failed",
    ),
)
