#!lua
-- batch: accept a batch: all members, the counters and the job that will gather them, in one step, or nothing.
-- ARGV[1] batch id  ARGV[2] tenant  ARGV[3] stream of the members  ARGV[4] due_ms (0: now)  ARGV[5] deadline_ms of the
--   members  ARGV[6] max live jobs  ARGV[7] max events that wait to be recorded  ARGV[8] in-flight set ('' none)
-- ARGV[9] in-flight limit (a batch counts as one)  ARGV[10] idempotency key ('' none)  ARGV[11] body hash
-- ARGV[12] key life (ms)  ARGV[13] tail of the batch's own job  ARGV[14] its stream  ARGV[15] its deadline_ms
-- ARGV[16] its due_ms, when the batch closes in any case  ARGV[17] how long results are kept (ms)  ARGV[18] queue
-- ARGV[19] what the recorder is told of the batch, kept as `asked` (JSON)  ARGV[20] when it was asked for (ms)
-- ARGV[21] 'staged' | 'here' | 'ask' (before any of it is staged: change nothing, say what speaks against it)
-- then per member its id, and when it is 'here' its tail and its row for the recorder (JSON); after 'ask' their number
-- Returns: time (us), 'free' (nothing speaks against it now) | 'accepted' | 'repeated' | 'mismatch' | 'overloaded' |
--   'backlog' | 'in_flight' | 'unstaged' (some members are gone again: begin anew), the id of the batch that answers.
-- Invariant: one batch per id and per idempotency key, however often this is sent; no part of a batch without the rest.
--   Members begin in the order given: each is due a thousandth of a millisecond after the one before.
local now_us = clock_us()
local now_ms = math.floor(now_us / 1000)
local id, tenant, stream, deadline_ms, set, idem = ARGV[1], ARGV[2], ARGV[3], ARGV[5], ARGV[8], ARGV[10]
local due_ms, closes_ms, staged, asks = tonumber(ARGV[4]), ARGV[16], ARGV[21] == 'staged', ARGV[21] == 'ask'
local key, members, rows, FIRST, CHUNK = KEY.batch .. id, KEY.batch_members .. id, KEY.rows .. id, 22, 1000

local function answer(word, answering)
  return {digits(now_us), word, answering or id}
end

local ids = {}
if not asks then
  for i = FIRST, #ARGV, staged and 1 or 3 do ids[#ids + 1] = ARGV[i] end
end
-- Call `use` with the ids of each portion, since a call takes so many arguments only.
local function in_portions(use)
  for first = 1, #ids, CHUNK do use(first, math.min(first + CHUNK - 1, #ids)) end
end

if call('EXISTS', key) == 1 then return answer('accepted') end
if idem ~= '' then
  check_type(idem, 'hash')
  local seen = call('HMGET', idem, 'hash', 'job')
  if seen[1] then return answer(seen[1] == ARGV[11] and 'repeated' or 'mismatch', seen[2]) end
end
check_accept()
for name, wanted in pairs({[stream] = 'stream', [ARGV[14]] = 'stream', [KEY.events] = 'stream', [rows] = 'list'}) do
  check_type(name, wanted)
end
local wanted = asks and tonumber(ARGV[FIRST]) or #ids
if call('ZCARD', KEY.live_index) + wanted + 1 > tonumber(ARGV[6]) then return answer('overloaded') end
if call('XLEN', KEY.events) >= tonumber(ARGV[7]) then return answer('backlog') end
if set ~= '' then
  check_type(set, 'set')
  if call('SCARD', set) >= tonumber(ARGV[9]) then return answer('in_flight') end
end
if asks then return answer('free') end
if staged then
  local found = call('EXISTS', rows) - 1
  in_portions(function(first, last)
    local names = {}
    for i = first, last do names[#names + 1] = KEY.live .. ids[i] end
    found = found + call('EXISTS', unpack(names))
  end)
  if found < #ids then return answer('unstaged') end
end

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
call('HSET', key, 'req.count', #ids, 'res.count', 0, 'failed.count', 0, 'cancelled.count', 0, 'status', 'pending',
  'tenant', tenant, 'queue', ARGV[18], 'created_ms', ARGV[20], 'closes_ms', closes_ms, 'keep_ms', ARGV[17],
  'deadline_ms', ARGV[15], 'asked', ARGV[19])
in_portions(function(first, last) call('RPUSH', members, unpack(ids, first, last)) end)
if staged then
  local due = due_ms > now_ms and due_ms or now_ms - #ids / 1000
  in_portions(function(first, last)
    local deadlines, dues = {}, {}
    for i = first, last do
      call('PERSIST', KEY.live .. ids[i])
      deadlines[#deadlines + 1] = deadline_ms
      deadlines[#deadlines + 1] = ids[i]
      dues[#dues + 1] = string.format('%.3f', due + (i - 1) / 1000)
      dues[#dues + 1] = ids[i]
    end
    call('ZADD', KEY.live_index, unpack(deadlines))
    call('ZADD', KEY.delayed, unpack(dues))
  end)
  call('PERSIST', rows)
else
  for i = FIRST, #ARGV, 3 do
    local fields = {'deadline', deadline_ms, 'record', 'message ' .. id}
    local due = due_ms > 0 and string.format('%.3f', due_ms + (i - FIRST) / 3000) or 0
    accept(ARGV[i], ARGV[i + 1], stream, tenant, deadline_ms, due, now_us, fields)
    call('RPUSH', rows, ARGV[i + 2])
  end
end
accept(id, ARGV[13], ARGV[14], tenant, ARGV[15], closes_ms, now_us, more)
remember('batch', id, tenant, 0, now_us, ARGV[19], rows)
conclude()
return answer('accepted')
