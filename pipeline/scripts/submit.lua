#!lua
-- submit: accept jobs: live record and entry in one step, or nothing. Refused by Redis itself when memory is full.
-- ARGV[1] max live jobs  ARGV[2] number of candidates  ARGV[3..] candidates (URLs, healthy, shuffled)
-- then per job 14 values: id, tail (envelope without its head), stream, tenant, deadline_ms, due_ms (0: now), reply
--   stream ('' none), in-flight set ('' none), in-flight limit, idempotency key ('' none), body hash, key life (ms),
--   'lease' when a replica is to be picked now, else '', and its record (see prelude)
-- Returns: time (us), then two values per job: 'accepted' | 'repeated' | 'mismatch' | 'overloaded' | 'in_flight', and the
--   id of the job that answers.
-- Invariant: one job per id and per idempotency key, however often this is sent; ties between replicas fall to the
--   earlier candidate.
local now_us = clock_us()
local max_jobs = tonumber(ARGV[1])
local candidates = {}
for i = 1, tonumber(ARGV[2]) do candidates[i] = ARGV[2 + i] end
local SIZE = 14
local jobs -- alive now
local answers = {digits(now_us)}

local function least_leased()
  local best, fewest
  for _, url in ipairs(candidates) do
    local leases = call('ZCARD', KEY.leases .. url)
    if not best or leases < fewest then best, fewest = url, leases end
  end
  return best
end

local function submit(id, tail, stream, tenant, deadline_ms, due_ms, reply, set, limit, idem, hash, idem_ms, leases,
  record)
  if idem ~= '' then
    local seen = call('HMGET', idem, 'hash', 'job')
    if seen[1] then
      if seen[1] ~= hash then return 'mismatch', seen[2] end
      return seen[2] == id and 'accepted' or 'repeated', seen[2]
    end
  end
  if call('EXISTS', KEY.live .. id, KEY.completion .. id) > 0 then return 'accepted', id end
  if jobs >= max_jobs then return 'overloaded', id end
  if set ~= '' and call('SCARD', set) >= tonumber(limit) then return 'in_flight', id end

  local url = leases == 'lease' and least_leased()
  local more = {}
  local function note(name, value)
    more[#more + 1] = name
    more[#more + 1] = value
  end
  note('deadline', deadline_ms)
  if reply ~= '' then note('reply', reply) end
  if set ~= '' then
    note('in_flight', set)
    call('SADD', set, id)
  end
  if idem ~= '' then
    note('idem', idem)
    call('HSET', idem, 'hash', hash, 'job', id)
    call('PEXPIRE', idem, idem_ms)
  end
  if url then
    note('lease', url)
    lease(id, url, now_us)
  end
  note_record(more, id, tenant, record, now_us)
  accept(id, tail, stream, tenant, deadline_ms, due_ms, now_us, more)
  jobs = jobs + 1
  return 'accepted', id
end

check_accept()
jobs = call('ZCARD', KEY.live_index)
for _, url in ipairs(candidates) do check_type(KEY.leases .. url, 'zset') end
for i = 3 + #candidates, #ARGV, SIZE do
  check_type(ARGV[i + 2], 'stream')
  if ARGV[i + 7] ~= '' then check_type(ARGV[i + 7], 'set') end
  if ARGV[i + 9] ~= '' then check_type(ARGV[i + 9], 'hash') end
  if ARGV[i + 13] ~= '' then
    check_type(KEY.events, 'stream')
    read_report(string.match(ARGV[i + 13], '^([^{]*) {'))
  end
end
for i = 3 + #candidates, #ARGV, SIZE do
  local word, id = submit(unpack(ARGV, i, i + SIZE - 1))
  answers[#answers + 1] = word
  answers[#answers + 1] = id
end
conclude()
return answers
