#!lua
-- deliver: accept a delivery: its own record, its job's live record and its entry, or its place among the delayed.
-- ARGV[1] id  ARGV[2] type  ARGV[3] tenant  ARGV[4] content (JSON; of attachments their names)
-- ARGV[5] what history is told of it (JSON)
-- ARGV[6] tail (envelope without its head)  ARGV[7] stream  ARGV[8] deadline_ms  ARGV[9] due_ms (0: now)
-- ARGV[10] how long it is kept once it has ended (ms)  ARGV[11] max live jobs  ARGV[12] max events that wait to be recorded
-- ARGV[13] in-flight set ('' none)  ARGV[14] in-flight limit  ARGV[15] reply stream ('' none)
-- ARGV[16] idempotency key ('' none)  ARGV[17] body hash  ARGV[18] its life (ms)  ARGV[19] the delivery it repeats ('' none)
-- ARGV[20] what its attachments hold (JSON, base64; '' nothing)
-- Returns: time (us), 'accepted' | 'repeated' | 'mismatch' (the key was used with another body) | 'overloaded' | 'backlog' |
--   'in_flight' | 'already_sent' (what it repeats went out) | 'under_way' (or is still to go out),
--   id of the delivery that answers, the status with which that was accepted ('' when it is not known any more).
-- Invariant: one delivery per id and per idempotency key, however often this is sent. One that is scheduled does not count
--   as in flight before its time (promote).
local now_us = clock_us()
local id, tenant, due_ms, set, idem = ARGV[1], ARGV[3], ARGV[9], ARGV[13], ARGV[16]
local key = KEY.delivery .. id
local function answer(word, answering)
  answering = answering or id
  local history = call('HGET', KEY.delivery .. answering, 'history') or ''
  return {digits(now_us), word, answering, string.match(history, '^%[%["(%a+)"') or ''}
end

check_accept()
check_type(ARGV[7], 'stream')
check_type(KEY.events, 'stream')
if set ~= '' then check_type(set, 'set') end
if idem ~= '' then
  check_type(idem, 'hash')
  local seen = call('HMGET', idem, 'hash', 'job')
  if seen[1] then
    if seen[1] ~= ARGV[17] then return answer('mismatch') end
    return answer(seen[2] == id and 'accepted' or 'repeated', seen[2])
  end
end
if call('EXISTS', key) == 1 then return answer('accepted') end
local before = ARGV[19] ~= '' and call('HGET', KEY.delivery .. ARGV[19], 'status')
if before == 'sent' or before == 'delivered' then return answer('already_sent') end
if RANKS[before or ''] and RANKS[before] <= RANKS.sending then return answer('under_way') end
if call('ZCARD', KEY.live_index) >= tonumber(ARGV[11]) then return answer('overloaded') end
if call('XLEN', KEY.events) >= tonumber(ARGV[12]) then return answer('backlog') end
local now_ms = digits(math.floor(now_us / 1000))
local status = tonumber(due_ms) * 1000 > now_us and 'scheduled' or 'pending'
local is_due = status == 'pending'
if set ~= '' and is_due and call('SCARD', set) >= tonumber(ARGV[14]) then return answer('in_flight') end

local history = '[["' .. status .. '",' .. now_ms .. ']]'
call('HSET', key, 'type', ARGV[2], 'tenant', tenant, 'status', status, 'history', history, 'content', ARGV[4],
  'created_ms', now_ms, 'due_ms', status == 'scheduled' and due_ms or now_ms, 'keep_ms', ARGV[10])
if ARGV[19] ~= '' then call('HSET', key, 'retry_of', ARGV[19]) end
if ARGV[20] ~= '' then call('HSET', key, 'files', ARGV[20]) end
local more = {'deadline', ARGV[8], 'record', 'delivery'}
local function note(name, value)
  more[#more + 1] = name
  more[#more + 1] = value
end
if ARGV[15] ~= '' then note('reply', ARGV[15]) end
if set ~= '' then
  note('in_flight', set)
  if is_due then call('SADD', set, id) end
end
if idem ~= '' then
  note('idem', idem)
  call('HSET', idem, 'hash', ARGV[17], 'job', id)
  call('PEXPIRE', idem, ARGV[18])
end
remember('delivery', id, tenant, 0, now_us, string.sub(ARGV[5], 1, -2) .. ',"created_ms":' .. now_ms
  .. ',"status":"' .. status .. '","history":' .. history .. '}')
accept(id, ARGV[6], ARGV[7], tenant, ARGV[8], due_ms, now_us, more)
conclude()
return answer('accepted')
