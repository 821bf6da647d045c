#!lua
-- chat_clear: begin a chat anew: what waits and what was said goes, the lock goes, the epoch rises; for another persona,
--   too.
-- ARGV[1] chat (as it stands in keys)  ARGV[2] chat id  ARGV[3] tenant  ARGV[4] how long the chat is kept (ms)
-- ARGV[5] life of a completion (ms)  ARGV[6] 'persona' where ARGV[7] is to be its persona (as in keys; '' none), else ''
-- Returns: time (us), epoch, messages that waited and never will be answered, 'dropped' when a reply was being made.
-- Invariant: nothing from before is sent afterwards: whoever still makes a reply has no lock to send it with.
local now_us = clock_us()
local now_ms = math.floor(now_us / 1000)
local key = ARGV[1]
local about, queue = KEY.chat .. key, KEY.chat_queue .. key
check_chat(key)
local holder = holder_of(key)
local live = holder and read_live(holder)
local epoch = math.max(now_ms, tonumber(call('HGET', about, 'epoch') or '0') + 1)
call('HSET', about, 'id', ARGV[2], 'tenant', ARGV[3], 'keep_ms', ARGV[4], 'epoch', digits(epoch))
if ARGV[6] == 'persona' then
  if ARGV[7] == '' then call('HDEL', about, 'persona') else call('HSET', about, 'persona', ARGV[7]) end
end
local chat = read_chat(key)
end_vanished(key, chat, now_us)
local waiting = call('LRANGE', queue, 0, -1)
call('DEL', queue, KEY.chat_lock .. key, KEY.chat_turns .. key)
call('HDEL', about, 'state', 'taken', 'single', 'typing_ms')
call('PEXPIRE', about, ARGV[4])
local cleared = end_messages(key, chat, waiting, 'cleared', 'null', now_us)
if cleared == 0 then tell_chat(key, chat, 'cleared', '"message_ids":[],"error":null', now_us) end
if live then cancel_live(holder, live, ARGV[5], now_us) end
conclude()
return {digits(now_us), digits(epoch), cleared, live and chat.taken > 0 and 'dropped' or ''}
