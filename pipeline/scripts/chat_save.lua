#!lua flags=allow-oom
-- chat_save: a run's reply is made: its messages leave the queue, the turns are kept, the reply is sent, history is told.
-- ARGV[1] chat (as it stands in keys)  ARGV[2] run's job id, which is the reply's message id, too  ARGV[3] state (JSON)
-- ARGV[4] the reply's text (JSON)  ARGV[5] turns kept for the brains  ARGV[6] what else history knows of the reply (JSON)
-- then the ids of the messages that it answers, in order
-- Returns: time (us), 'saved' | 'already' (by this run, before) | 'lost' (the lock is not this run's) | 'gone' (none of
--   the messages waits any more), how many messages were answered.
-- Invariant: a run saves and sends once, and only while it holds the lock; exactly what it answered leaves the queue.
local now_us = clock_us()
local now_ms = digits(math.floor(now_us / 1000))
local key, run = ARGV[1], ARGV[2]
local about, queue, open, turns = KEY.chat .. key, KEY.chat_queue .. key, KEY.chat_open .. key, KEY.chat_turns .. key
check_chat(key)
local chat = read_chat(key)
if chat and call('HGET', about, 'saved') == run then return {digits(now_us), 'already', 0} end
if not chat or holder_of(key) ~= run then return {digits(now_us), 'lost', 0} end

local ids, rows, answered = {}, {}, {}
for i = 7, #ARGV do
  local element = call('HGET', open, ARGV[i])
  if element and call('LREM', queue, 1, element) == 1 then
    call('HDEL', open, ARGV[i])
    ids[#ids + 1] = '"' .. ARGV[i] .. '"'
    answered[#answered + 1] = element
  end
end
call('HDEL', about, 'taken')
if #ids == 0 then return {digits(now_us), 'gone', 0} end
local function keep(role, element, more)
  local seq = next_turn(key, chat, now_us)
  call('RPUSH', turns, '{"seq":' .. digits(seq) .. ',"role":"' .. role .. '",' .. string.sub(element, 2))
  rows[#rows + 1] = turn_row(chat, seq, role, element, more)
end
for _, element in ipairs(answered) do
  keep('user', element, '"status":"answered","is_processed":true,"answered_by":"' .. run .. '"')
end
local reply = '{"message_id":"' .. run .. '","text":' .. ARGV[4] .. ',"at_ms":' .. now_ms .. '}'
keep('assistant', reply, '"status":"sent","is_processed":true,"about":' .. ARGV[6])
call('LTRIM', turns, -ARGV[5], -1)
call('PEXPIRE', turns, chat.keep_ms)
call('HSET', about, 'state', ARGV[3], 'saved', run, 'active_ms', now_ms)
call('PEXPIRE', about, chat.keep_ms)
if call('EXISTS', queue) == 1 then call('PEXPIRE', queue, digits(chat.queue_ms)) end
local more = '"message_ids":[' .. table.concat(ids, ',') .. '],"message_id":"' .. run .. '","text":' .. ARGV[4]
tell_chat(key, chat, 'reply', more, now_us)
remember_chat(chat, rows, now_us)
return {digits(now_us), 'saved', #ids}
