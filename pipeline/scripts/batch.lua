#!lua
-- batch: accept a batch: all members, the counters and the job that will gather them, in one step, or nothing.
-- ARGV[1] batch id  ARGV[2] tenant  ARGV[3] stream of the members  ARGV[4] due_ms (0: now)  ARGV[5] deadline_ms of the
--   members  ARGV[6] max live jobs  ARGV[7] max events that wait to be recorded  ARGV[8] in-flight set ('' none)
-- ARGV[9] in-flight limit (a batch counts as one)  ARGV[10] idempotency key ('' none)  ARGV[11] body hash
-- ARGV[12] key life (ms)  ARGV[13] tail of the batch's own job  ARGV[14] its stream  ARGV[15] its deadline_ms
-- ARGV[16] its due_ms, when the batch closes in any case  ARGV[17] how long results are kept (ms)  ARGV[18] queue
-- ARGV[19] what the recorder is told of the batch, kept as `asked` (JSON)  ARGV[20] when it was asked for (ms)
-- ARGV[21] 'staged' | 'here' | 'ask' (before any of it is staged: change nothing, say what speaks against it)
-- then per member its id, its tail and its row for the recorder (JSON); after 'staged' and 'ask' only their number
-- Returns: time (us), 'free' (nothing speaks against it now) | 'accepted' | 'repeated' | 'mismatch' | 'overloaded' |
--   'backlog' | 'in_flight' | 'unstaged' (some members are gone again: begin anew), the id of the batch that answers.
-- Invariant: one batch per id and per idempotency key, however often this is sent; no part of a batch without the rest.
--   Members begin in the order given: each is due a thousandth of a millisecond after the one before. However many were
--   staged, none of them is touched here: `promote` has them enter, portion by portion.
local now_us = clock_us()
local id, tenant, stream, deadline_ms, set, idem = ARGV[1], ARGV[2], ARGV[3], ARGV[5], ARGV[8], ARGV[10]
local due_ms, closes_ms, staged, asks = tonumber(ARGV[4]), ARGV[16], ARGV[21] == 'staged', ARGV[21] == 'ask'
local key, members, rows, FIRST = KEY.batch .. id, KEY.batch_members .. id, KEY.rows .. id, 22
local wanted = (asks or staged) and tonumber(ARGV[FIRST]) or (#ARGV - FIRST + 1) / 3

local function answer(word, answering)
  -- What was staged in vain need not rest before it is taken away.
  if staged and word ~= 'accepted' and word ~= 'unstaged' then call('ZADD', KEY.staged, 'XX', 0, id) end
  return {digits(now_us), word, answering or id}
end

if call('EXISTS', key) == 1 then return answer('accepted') end
if idem ~= '' then check_type(idem, 'hash') end
if set ~= '' then check_type(set, 'set') end
check_accept()
for name, kind in pairs({
  [stream] = 'stream', [ARGV[14]] = 'stream', [KEY.events] = 'stream', [rows] = 'list', [members] = 'list',
  [KEY.staged] = 'zset', [KEY.entering] = 'zset',
}) do check_type(name, kind) end
if idem ~= '' then
  local seen = call('HMGET', idem, 'hash', 'job')
  if seen[1] then return answer(seen[1] == ARGV[11] and 'repeated' or 'mismatch', seen[2]) end
end
local there = call('LLEN', members)
-- What others have staged may never be committed: it keeps them from staging more, and a batch that is there from nothing.
local jobs = call('ZCARD', KEY.live_index) - there
if staged then
  for _, other in ipairs(call('ZRANGE', KEY.staged, 0, -1)) do
    local theirs = KEY.batch_members .. other
    if other ~= id and has_type(theirs, 'list') then jobs = jobs - call('LLEN', theirs) end
  end
end
if jobs + wanted + 1 > tonumber(ARGV[6]) then return answer('overloaded') end
if call('XLEN', KEY.events) >= tonumber(ARGV[7]) then return answer('backlog') end
if set ~= '' and call('SCARD', set) >= tonumber(ARGV[9]) then return answer('in_flight') end
if asks then return answer('free') end
if staged and (there ~= wanted or call('LLEN', rows) ~= wanted) then return answer('unstaged') end

local more = {'deadline', ARGV[15], 'record', 'batch'}
if set ~= '' then
  call('SADD', set, id)
  more[#more + 1] = 'in_flight'
  more[#more + 1] = set
end
if idem ~= '' then
  call('HSET', idem, 'hash', ARGV[11], 'job', id)
  call('PEXPIRE', idem, ARGV[12])
  more[#more + 1] = 'idem'
  more[#more + 1] = idem
end
call('HSET', key, 'req.count', wanted, 'res.count', 0, 'failed.count', 0, 'cancelled.count', 0, 'status', 'pending',
  'tenant', tenant, 'queue', ARGV[18], 'created_ms', ARGV[20], 'closes_ms', closes_ms, 'keep_ms', ARGV[17],
  'deadline_ms', ARGV[15], 'asked', ARGV[19])
if staged then
  call('HSET', key, 'entered', 0, 'due_ms', ARGV[4])
  call('ZADD', KEY.entering, digits(math.floor(now_us / 1000)), id)
  call('ZREM', KEY.staged, id)
else
  for i = FIRST, #ARGV, 3 do
    local fields = {'deadline', deadline_ms, 'record', 'message ' .. id}
    local due = due_ms > 0 and string.format('%.3f', due_ms + (i - FIRST) / 3000) or 0
    accept(ARGV[i], ARGV[i + 1], stream, tenant, deadline_ms, due, now_us, fields)
    call('RPUSH', members, ARGV[i])
    call('RPUSH', rows, ARGV[i + 2])
  end
end
accept(id, ARGV[13], ARGV[14], tenant, ARGV[15], closes_ms, now_us, more)
remember('batch', id, tenant, 0, now_us, ARGV[19], rows)
conclude()
return answer('accepted')
